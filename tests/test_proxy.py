"""A proxy that is aligned, measured, asked for its probabilities; and what a kill leaves of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import dataset_in, student_in, tiny_dataset, tiny_student

from edgedistill.artifacts import Dataset, Student, TokenTargets, Traces
from edgedistill.check_specs import TextCheck
from edgedistill.distill import distill
from edgedistill.distill.lesson import Pupil
from edgedistill.distill.proxy import Proxy, align_proxy, require_aligned
from edgedistill.distill.token_targets import targets_of_proxy
from edgedistill.errors import DatasetError, GateFailed
from edgedistill.methods import DistillSpec, LoraSpec, ProxySpec
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import CurateSpec, StudentSpec
from edgedistill.targets import Targets
from edgedistill.torch_runtime import load_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT = StudentSpec(weights="tiny", max_tokens=6)
CHECK = TextCheck(kind="exact")
LORA = LoraSpec(rank=8, alpha=16)
SPEC = DistillSpec(
    lora=LORA, batch_size=4, epochs=1, precision="fp32", evaluations=1, checkpoints=4
)
PROXY = ProxySpec(
    weights="tiny.gguf",
    lora=LORA,
    batch_size=4,
    warm_up_epochs=1,
    learning_rate=5e-3,
    rounds=2,
    round_epochs=2,
    round_learning_rate=2e-3,
    min_agreement=0.0,
    top_k=5,
)
ANSWERS = ("the one", "thin")
MERGES = ("h e", "i n", "h i", "Ġ o")  # another way to cut the same words
CLEANING = CurateSpec()


def no_traces(folder: Path) -> Traces:
    return Traces(folder, "none", folder / "none.jsonl", 0, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8, answers=ANSWERS)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("other"), seed=1, merges=MERGES)


def pupil(model: Student, dataset: Dataset) -> Pupil:
    return Pupil(model, PROMPT, SPEC, CHECK, dataset)


def targets(
    proxy: Proxy, student: Student, out: Path, spec: ProxySpec = PROXY, traces: Traces | None = None
) -> TokenTargets:
    traces = traces or no_traces(out)
    return targets_of_proxy(proxy, traces, student, PROMPT, CLEANING, spec, out, Silent())


def facts(out: Path, stage: str) -> list[dict[str, Any]]:
    """Of every complete folder of a stage, the oldest first."""
    files = sorted(out.glob(f"{stage}-[0-9a-f]*/manifest.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(file.read_text("utf-8"))["facts"] for file in files]


@pytest.fixture(scope="module")
def aligned(
    other: Student, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Proxy, Path]:
    out = tmp_path_factory.mktemp("aligned")
    return align_proxy(pupil(other, dataset), PROXY, out, Silent()), out


def test_a_proxy_learns_the_teacher_and_each_step_is_measured(
    aligned: tuple[Proxy, Path], other: Student
) -> None:
    proxy, out = aligned
    (warmed,), rounds = facts(out, "proxy"), facts(out, "proxy-round")
    assert warmed["name"] == other.name
    assert warmed["agreement_at_start"] == 0 < proxy.agreement
    before = warmed["agreement"]
    for found in rounds:
        assert found["agreement_before"] == before
        assert found["kept"] == (found["agreement"] > before)
        assert found["answers"] == 8
        assert found["pairs"] <= found["disagreements"]
        before = max(before, found["agreement"])
    assert all(found["kept"] for found in rounds[:-1])
    assert proxy.agreement == before
    assert proxy.adapter is not None


def test_a_round_that_raises_nothing_is_the_last_and_not_kept(
    other: Student, tmp_path: Path
) -> None:
    easy = tiny_dataset(tmp_path / "dataset", rows=8, answers=("the one",))
    spec = PROXY.model_copy(update={"warm_up_epochs": 6, "rounds": 3, "min_agreement": 1.0})
    proxy = align_proxy(pupil(other, easy), spec, tmp_path, Silent())
    (found,) = facts(tmp_path, "proxy-round")
    assert (found["agreement_before"], found["kept"]) == (1, False)
    assert proxy.adapter is not None
    assert proxy.adapter.name.startswith("proxy-")
    assert not proxy.adapter.name.startswith("proxy-round")


def test_pairs_hold_the_teachers_answer_and_how_likely_both_were(
    aligned: tuple[Proxy, Path],
) -> None:
    _, out = aligned
    first = min(out.glob("proxy-round-*/pairs.jsonl"), key=lambda p: p.stat().st_mtime)
    pairs = [json.loads(line) for line in first.read_text("utf-8").splitlines()]
    assert [pair["row"]["answer"] for pair in pairs] == [ANSWERS[i % 2] for i in range(8)]
    with_worse = [pair for pair in pairs if pair["rejected"] is not None]
    assert with_worse, "a random model drawn from says something else"
    for pair in with_worse:
        assert pair["rejected"] != pair["row"]["answer"]
        assert max(pair["reference"]) < 0
    assert [p["reference"] for p in pairs if p["rejected"] is None] == [[0, 0]] * (
        len(pairs) - len(with_worse)
    )


def test_an_unaligned_proxy_is_refused_and_nothing_is_trained_again(
    aligned: tuple[Proxy, Path], other: Student, dataset: Dataset
) -> None:
    proxy, out = aligned
    made = set(out.iterdir())
    strict = PROXY.model_copy(update={"min_agreement": 1.0})
    low = replace(proxy, agreement=0.25)
    with pytest.raises(GateFailed, match=r"0\.250 of 8 .*min_agreement \(1\)") as caught:
        require_aligned(low, strict)
    assert caught.value.exit_code == 3
    assert "warm_up_epochs" in str(caught.value.hint)
    bound = min(1.0, proxy.agreement + 0.01)
    if proxy.agreement < 1:
        stricter = PROXY.model_copy(update={"min_agreement": bound})
        with pytest.raises(GateFailed):
            align_proxy(pupil(other, dataset), stricter, out, Silent())
    assert set(out.iterdir()) == made


def direct(model: Student, dataset: Dataset, k: int) -> list[Any]:
    """The k likeliest tokens at each answer token, and their log-probabilities, row by row."""
    shown, loaded, found = StudentPrompt(model.folder, PROMPT), load_model(model.folder), []
    for row in pupil(model, dataset).rows():
        asked, answer = shown.prompt_ids(row.prompt), shown.answer_ids(row.answer)
        with torch.no_grad():
            logits = loaded(torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1]
        found.append(logits.log_softmax(-1).topk(k))
    return found


def test_targets_of_the_same_tokenizer_are_the_direct_top_k(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    """But for special tokens, which write no bytes: they count into the tail."""
    twin = tiny_student(tmp_path / "twin", seed=5)
    asked = PROXY.model_copy(update={"warm_up_epochs": 0, "rounds": 0})
    proxy = align_proxy(pupil(twin, dataset), asked, tmp_path, Silent())
    assert proxy.adapter is None
    found = Targets(targets(proxy, student, tmp_path, asked).file)
    special = {0, 1}
    for name, top in zip(found.rows, direct(twin, dataset, 5), strict=True):
        row = found.row(name)
        assert row.known.all()
        for at in range(len(row.known)):
            wanted = {
                int(i): float(x)
                for i, x in zip(top.indices[at], top.values[at], strict=True)
                if int(i) not in special
            }
            listed = {int(i): float(x) for i, x in zip(row.ids[at], row.logprobs[at], strict=True)}
            assert wanted.keys() <= listed.keys()  # and the answer's own token, where none of them
            assert [listed[i] for i in wanted] == pytest.approx(list(wanted.values()), abs=1e-4)
    (about,) = facts(tmp_path, "targets")
    assert about["coverage"] == 1
    assert about["mean_log_likelihood"] < 0 < about["std_log_likelihood"]


def test_a_student_learns_from_a_proxy_with_other_tokens(
    aligned: tuple[Proxy, Path], student: Student, dataset: Dataset
) -> None:
    proxy, out = aligned
    made = targets(proxy, student, out)
    found = Targets(made.file)
    ours = StudentPrompt(student.folder, PROMPT).answer_ids("the one")
    theirs = StudentPrompt(proxy.pupil.model.folder, PROMPT).answer_ids("the one")
    assert len(ours) != len(theirs)
    assert len(found.row("train-0").known) == len(ours)
    assert facts(out, "targets")[-1]["coverage"] > 0.9
    spec = SPEC.model_copy(update={"method": "proxy", "proxy": PROXY})
    adapter = distill(dataset, student, PROMPT, spec, CHECK, out, Silent(), made)
    plain = distill(dataset, student, PROMPT, SPEC, CHECK, out, Silent())
    assert adapter.digest != plain.digest
    heavier = PROXY.model_copy(update={"kl_weight": 3.0})
    other = spec.model_copy(update={"proxy": heavier})
    assert distill(dataset, student, PROMPT, other, CHECK, out, Silent(), made) != adapter


def test_too_little_coverage_ends_the_build(
    aligned: tuple[Proxy, Path], student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    proxy, _ = aligned
    as_teacher = PROXY.model_copy(update={"prompt": "teacher"})
    raw = replace(proxy, adapter=None)
    traces = traces_of(tmp_path, {"train-0": "the one"})
    with pytest.raises(DatasetError, match=r"distill\.proxy\.min_coverage asks for") as caught:
        targets(raw, student, tmp_path, as_teacher, traces)
    assert "7 of 8 rows: there is no trace of the prompt" in str(caught.value)


def traces_of(folder: Path, said: dict[str, str]) -> Traces:
    file = folder / "traces.jsonl"
    lines = [json.dumps({"prompt_id": name, "text": text}) + "\n" for name, text in said.items()]
    file.write_text("".join(lines), "utf-8")
    return Traces(folder, "traces", file, len(said), 0)


def test_a_proxy_asked_as_the_teacher_reads_what_the_teacher_said(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    """A fence around the answers is read, and no target tells the student to write one."""
    fenced = {f"train-{i}": f"```sql\n{ANSWERS[i % 2]}\n```" for i in range(8)}
    as_teacher = PROXY.model_copy(update={"prompt": "teacher", "warm_up_epochs": 0, "rounds": 0})
    own = replace(pupil(tiny_student(tmp_path / "t", seed=5), dataset), cleaning=CLEANING)
    proxy = align_proxy(own, as_teacher, tmp_path, Silent())
    made = targets(proxy, student, tmp_path, as_teacher, traces_of(tmp_path, fenced))
    found, shown = Targets(made.file), StudentPrompt(student.folder, PROMPT)
    assert facts(tmp_path, "targets")[0]["coverage"] > 0.7
    for name, answer in (("train-0", ANSWERS[0]), ("train-1", ANSWERS[1])):
        row = found.row(name)
        assert len(row.known) == len(shown.answer_ids(answer))
        listed = {int(i) for i in row.ids[row.known].ravel() if i >= 0}
        assert not any("`" in shown.decode([i]) for i in listed)
        assert np.exp(row.logprobs[row.known]).sum(1).max() <= 1 + 1e-5


def test_killed_between_rounds_it_ends_with_the_same_proxy(
    aligned: tuple[Proxy, Path], other: Student, dataset: Dataset, tmp_path: Path
) -> None:
    unbroken, _ = aligned
    words = [sys.executable, __file__, str(other.folder), str(dataset.folder), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths})
    limit = time.monotonic() + 120
    try:
        while not list(tmp_path.glob("proxy-round-*/resume/pairs.json*")):
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < limit
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    assert list(tmp_path.glob("proxy-[0-9a-f]*/manifest.json"))
    assert not list(tmp_path.glob("proxy-round-*/manifest.json"))
    warmed = next(tmp_path.glob("proxy-[0-9a-f]*/manifest.json")).stat().st_mtime_ns
    again = align_proxy(pupil(other, dataset), PROXY, tmp_path, Silent())
    assert (again.digest, again.agreement) == (unbroken.digest, unbroken.agreement)
    assert next(tmp_path.glob("proxy-[0-9a-f]*/manifest.json")).stat().st_mtime_ns == warmed


if __name__ == "__main__":  # the run that is killed
    told = [Path(word) for word in sys.argv[1:]]
    same = pupil(student_in(told[0], seed=1), dataset_in(told[1], 8))
    align_proxy(same, PROXY, told[2], Silent())
