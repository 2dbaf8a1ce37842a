"""Prompts that the teacher was never asked, answered by a proxy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_proxy import CHECK, PROXY, SPEC, facts, no_traces, targets
from tiny import tiny_dataset, tiny_student

from edgedistill.artifacts import Dataset, Student
from edgedistill.check_specs import SqlExecutionCheck
from edgedistill.distill import distill
from edgedistill.distill.further import MARK, with_further
from edgedistill.distill.lesson import Pupil, write_rows
from edgedistill.distill.proxy import Proxy
from edgedistill.errors import DatasetError
from edgedistill.fidelity import read_rows
from edgedistill.methods import ProxySpec
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec

PROMPT = StudentSpec(weights="tiny", max_tokens=6)
HAD = "How many tickets in month 12, the 0th?"  # of tiny_dataset


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=4)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Says the same to all prompts, of some a little surer than of others."""
    made = tiny_student(tmp_path_factory.mktemp("speaker"), says="Sure")
    tensors, chance = load_file(made.folder / "model.safetensors"), np.random.default_rng(0)
    for name in (name for name in tensors if name.endswith("o_proj.weight")):
        tensors[name] = chance.normal(0, 0.01, tensors[name].shape).astype(np.float32)
    tensors["model.norm.weight"] *= 0.3  # it would be sure of all of them
    save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture
def proxy(speaker: Student, dataset: Dataset) -> Proxy:
    return Proxy(Pupil(speaker, PROMPT, SPEC, CHECK, dataset), None, "as-it-is", 0.5)


def further(
    proxy: Proxy, spec: ProxySpec, out: Path, student: Student | None = None, longest: int = 512
) -> Dataset:
    model = student or proxy.pupil.model
    return with_further(proxy, spec, model, PROMPT, longest, out, Silent())


def asking(folder: Path, *prompts: str, keep: float = 1.0) -> ProxySpec:
    file = folder / "further.jsonl"
    lines = [json.dumps({"id": f"f{i}", "prompt": text}) for i, text in enumerate(prompts)]
    file.write_text("\n".join(lines), "utf-8")
    return PROXY.model_copy(update={"prompts": file, "keep": keep})


def test_its_answers_are_rows_beside_the_teachers(
    proxy: Proxy, dataset: Dataset, student: Student, tmp_path: Path
) -> None:
    spec = asking(tmp_path, "one more", "another one", "One more!", HAD)
    more = further(proxy, spec, tmp_path)
    before, after = (read_rows(d.folder / "train.jsonl") for d in (dataset, more))
    assert after[:4] == before
    assert [row.id for row in after[4:]] == [f"{MARK}f0", f"{MARK}f1"]  # the others are no news
    assert all(row.answer for row in after)
    assert more.train == 6
    assert more.digest != dataset.digest
    assert read_rows(more.folder / "held_out.jsonl") == read_rows(dataset.folder / "held_out.jsonl")
    found = facts(tmp_path, "proxy-answers")[0]
    assert (found["asked"], found["unseen_met"]) == (2, 0)
    assert further(proxy, spec, tmp_path) == more
    proxy = replace(proxy, pupil=replace(proxy.pupil, dataset=more))
    probable = targets(proxy, student, tmp_path, traces=no_traces(tmp_path))
    own = SPEC.model_copy(update={"method": "proxy", "proxy": spec})
    made = distill(more, student, PROMPT, own, CHECK, tmp_path, Silent(), probable)
    assert (
        json.loads((made.folder / "manifest.json").read_text("utf-8"))["facts"]["train_rows"] == 6
    )


def test_a_further_conversation_is_learnt_whole(proxy: Proxy, tmp_path: Path) -> None:
    spec, said = asking(tmp_path), [{"role": "system", "content": "Be brief."}]
    asked = {"id": "f0", "messages": [*said, {"role": "user", "content": HAD}], "weight": 3}
    assert spec.prompts is not None
    spec.prompts.write_text(json.dumps(asked), "utf-8")
    more = further(proxy, spec, tmp_path)
    row = read_rows(more.folder / "train.jsonl")[-1]
    assert (row.prompt, list(row.history), row.weight) == (HAD, said, 3)


def test_what_it_is_less_sure_of_is_left_out(proxy: Proxy, tmp_path: Path) -> None:
    prompts = ("one more", "another one", "the third", "on and on")
    all_of_them = further(proxy, asking(tmp_path, *prompts), tmp_path)
    surer = further(proxy, asking(tmp_path, *prompts, keep=0.5), tmp_path)
    every, half = facts(tmp_path, "proxy-answers")
    assert (all_of_them.train, surer.train) == (8, 6)
    assert (half["kept"], half["less_sure"]) == (2, 2)
    assert half["mean_log_likelihood"] > every["mean_log_likelihood"]


def test_wordings_that_are_unseen_no_more_are_counted(
    proxy: Proxy, dataset: Dataset, tmp_path: Path
) -> None:
    rows = read_rows(dataset.folder / "held_out.jsonl")
    unseen = [replace(row, seen=False, phrasing="one more") for row in rows[:3]]
    other = tiny_dataset(tmp_path / "other", rows=4)
    write_rows(other.folder / "held_out.jsonl", [*unseen, rows[3]])
    own = replace(proxy, pupil=replace(proxy.pupil, dataset=other))
    further(own, asking(tmp_path, "one more"), tmp_path)
    assert facts(tmp_path, "proxy-answers")[0]["unseen_met"] == 3


def test_prompts_that_teach_nothing_new_are_refused(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the teacher was asked all of these prompts"):
        further(proxy, asking(tmp_path, HAD), tmp_path)


def test_answers_that_are_none_are_refused(proxy: Proxy, tmp_path: Path) -> None:
    database = Path(__file__).parent.parent / "recipes" / "support-sql" / "tickets.db"
    check = SqlExecutionCheck(kind="sql-execution", database=database)
    asked = replace(proxy, pupil=replace(proxy.pupil, check=check))
    with pytest.raises(DatasetError, match=r"no answer of the proxy to 1 further prompts can be"):
        further(asked, asking(tmp_path, "one more"), tmp_path)


def test_answers_that_are_cut_off_are_left_out(proxy: Proxy, tmp_path: Path) -> None:
    short = replace(proxy.pupil, prompt=PROMPT.model_copy(update={"max_tokens": 4}))
    with pytest.raises(DatasetError, match="can be used: 1 empty or cut off"):
        further(replace(proxy, pupil=short), asking(tmp_path, "one more"), tmp_path)


def test_a_row_that_is_too_long_for_the_student_is_left_out(proxy: Proxy, tmp_path: Path) -> None:
    spec = asking(tmp_path, "one more", "on and on " * 30)
    made = further(proxy, spec, tmp_path, longest=100)
    assert made.train == proxy.pupil.dataset.train + 1
    assert facts(tmp_path, "proxy-answers")[0]["unusable"] == {"longer than distill.max_length": 1}


def test_what_the_teacher_refused_is_not_the_proxys_to_answer(proxy: Proxy, tmp_path: Path) -> None:
    other = tiny_dataset(tmp_path / "other", rows=4)
    line = json.dumps({"id": "r", "prompt": "One  more!", "reason": "refused"})
    (other.folder / "rejected.jsonl").write_text(f"{line}\n", "utf-8")
    own = replace(proxy, pupil=replace(proxy.pupil, dataset=other))
    spec = asking(tmp_path, "one more", "another one")
    made = further(own, spec, tmp_path)
    assert [row.id for row in read_rows(made.folder / "train.jsonl")][4:] == [f"{MARK}f1"]
    assert further(proxy, spec, tmp_path).train == 6
