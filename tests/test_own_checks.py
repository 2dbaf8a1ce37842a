"""Checks with a program or a model behind them: a user's Python file, and an embedding model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from edgedistill.bench.measuring import threw
from edgedistill.check_specs import Check, EmbeddingCheck, PythonCheck
from edgedistill.checks import check_identity, make_checker, thrown_by
from edgedistill.checks.own import PythonChecker
from edgedistill.errors import DatasetError

OWN = '''
import os, sys, time

def invalid(answer):
    return "shouts" if answer.isupper() else None

def same(answer, teacher):
    """The same first word."""
    print("to nobody")
    if answer == "hang":
        time.sleep(60)
    if answer == "die":
        os._exit(3)
    return answer.split()[0] == teacher.split()[0]
'''


@pytest.fixture
def own(tmp_path: Path) -> Iterator[PythonChecker]:
    file = tmp_path / "check é.py"
    file.write_text(OWN, "utf-8")
    checker = PythonChecker(file, timeout_seconds=20)
    yield checker
    checker.close()


def test_a_check_of_ones_own(own: PythonChecker) -> None:
    assert own.description == "The same first word. (a check of your own, check é.py)."
    assert own.same("yes sir", "yes")
    assert not own.same("no", "yes")
    assert own.invalid("NO") == "shouts"
    assert own.invalid("no") is None
    assert thrown_by(own) == {}
    assert threw(own) == []


def test_what_it_throws_on_one_answer_is_kept_and_not_the_end(own: PythonChecker) -> None:
    assert not own.same(" ", "yes")
    assert not own.same("die", "yes")
    assert own.same("yes", "yes")
    thrown = thrown_by(own)
    assert thrown[" "] == "IndexError: list index out of range"
    assert thrown["die"].startswith("the check died while it was asked to call: exit code 3")
    assert len(thrown) == 2
    assert threw(own) == [
        "the check threw on 2 answers, which count as not the same; the first, ' ': IndexError: "
        "list index out of range"
    ]


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "check.py"
    file.write_text(OWN, "utf-8")
    checker = PythonChecker(file, timeout_seconds=20)
    checker._timeout_seconds = 0.5  # of the next child; the first start may be slow
    checker.close()
    try:
        assert not checker.same("hang", "yes")
        assert "gave no answer" in checker.thrown["hang"]
    finally:
        checker.close()


@pytest.mark.parametrize(
    ("text", "why"),
    [("same = 1", "it has no function `same`"), ("import nowhere", "No module named 'nowhere'")],
)
def test_a_file_that_is_no_check(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "check.py"
    file.write_text(text, "utf-8")
    with pytest.raises(DatasetError, match=why):
        make_checker(PythonCheck(kind="python", file=file))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, in a real model's layout."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a cat dog sat ran far".split()]
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_embeddings_are_the_mean_of_the_last_layer(bert: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        one, two = (
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in ("the cat sat", "a dog ran far")
        )
    cosine = float(one @ two / one.norm() / two.norm())
    for least, same in ((cosine - 1e-3, True), (cosine + 1e-3, False)):
        assert 0 < least < 1
        checker = make_checker(EmbeddingCheck(kind="embedding", model=bert, min_cosine=least))
        assert checker.same("the cat sat", "a dog ran far") is same
        assert checker.same("the cat sat", " The cat sat\n")
        assert not checker.same("", "")
    assert not math.isclose(cosine, 1.0, abs_tol=1e-3)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="embedding model cannot be loaded"):
        make_checker(EmbeddingCheck(kind="embedding", model=tmp_path))


def test_a_folder_counts_by_its_content(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bert.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    here, there = (EmbeddingCheck(kind="embedding", model=m) for m in (bert, copy))
    assert check_identity(here) == check_identity(there)
    (copy / "config.json").write_text("{}", "utf-8")
    assert check_identity(here) != check_identity(there)


def test_the_docs_name_every_kind_and_their_own_check_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checks.md").read_text("utf-8")
    named = set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE))
    specs = get_args(get_args(Check)[0])
    assert named == {kind for s in specs for kind in get_args(s.model_fields["kind"].annotation)}
    file = tmp_path / "check.py"
    file.write_text(page.split("```python\n")[1].split("```")[0], "utf-8")
    checker = PythonChecker(file, timeout_seconds=20)
    try:
        assert checker.invalid("hello") == "names no order"
        assert checker.same("order 12 is late", "order 12 will be late")
        assert not checker.same("order 12 is late", "order 13 is late")
    finally:
        checker.close()
