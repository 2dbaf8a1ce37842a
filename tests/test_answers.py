"""What a model says when it is asked: draws that a kill does not change, and likelihoods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_dataset, tiny_student
from training_rows import rows_of_lengths

from edgedistill.artifacts import Student
from edgedistill.check_specs import TextCheck
from edgedistill.distill.answers import asked, draw, log_likelihoods, predictions
from edgedistill.distill.lesson import Job, Pupil
from edgedistill.distill.preferences import usable
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.recipe import CurateSpec, StudentSpec
from edgedistill.torch_runtime import BATCH, generate, load_model, shared_tokens

SAMPLES = 2 * BATCH // 8 + 1  # three batches of 8 rows
PROMPT = StudentSpec(weights="tiny", max_tokens=5)
SPEC = DistillSpec(lora=LoraSpec(rank=4, alpha=8), precision="fp32")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pupil(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Pupil:
    dataset = tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8)
    return Pupil(student, PROMPT, SPEC, TextCheck(kind="exact"), dataset)


def drawn(
    pupil: Pupil, kept: Path, seed: str = "0", temperature: float = 1.0, samples: int = SAMPLES
) -> list[list[str]]:
    return draw(pupil.job(), pupil.rows(), samples, temperature, seed, kept, Silent())


def test_the_same_seed_draws_the_same_and_a_torn_file_goes_on(pupil: Pupil, tmp_path: Path) -> None:
    whole = drawn(pupil, tmp_path / "a.jsonl")
    assert [len(each) for each in whole] == [SAMPLES] * 8
    assert len({answer for each in whole for answer in each}) > 8
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "b.jsonl").write_bytes(lines[0] + lines[1][:-7])
    assert drawn(pupil, tmp_path / "b.jsonl") == whole
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)
    assert drawn(pupil, tmp_path / "c.jsonl", seed="1") != whole


def test_cold_draws_are_the_greedy_answer(pupil: Pupil, tmp_path: Path) -> None:
    job = pupil.job()
    cold = draw(job, job.exam().rows, 2, 1e-3, "0", tmp_path / "a.jsonl", Silent())
    with asked(job) as learner:
        greedy = job.exam().answers(learner.plain)
    assert cold == [[answer, answer] for answer in greedy]


@pytest.mark.parametrize(("window", "reads"), [(None, 100), (64, 0)])
def test_what_prompts_begin_with_is_read_once(
    student: Student, monkeypatch: pytest.MonkeyPatch, window: int | None, reads: int
) -> None:
    model = load_model(student.folder)
    begin = [3 + i % 200 for i in range(100)]
    prompts = [begin + list(range(20 + n, 60, 9 - n)) for n in range(5)]
    monkeypatch.setattr(model.config, "sliding_window", window, raising=False)
    alone = [generate(model, [prompt], 6, frozenset({2}))[0] for prompt in prompts]
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert generate(model, prompts, 6, frozenset({2}), batch_size=3) == alone
    assert [shape[1] for shape in seen if shape[0] == 1] == [reads] * bool(reads)
    assert max(columns for rows, columns in seen if rows > 1) < 100 or not reads


@pytest.mark.parametrize("shared", [0, 150])
def test_likelihoods_and_predictions_are_those_of_the_model_alone(
    shared: int, pupil: Pupil, student: Student
) -> None:
    model = load_model(student.folder)
    begin = tuple(3 + i % 200 for i in range(shared))
    rows = [replace(row, prompt=begin + row.prompt) for row in rows_of_lengths(9, 14, 30)]
    assert shared_tokens([row.prompt for row in rows]) == shared
    with asked(pupil.job()) as learner:
        assert not any(parameter.requires_grad for parameter in learner.parameters())
        found = log_likelihoods(learner, rows, "fp32")
        listed = list(predictions(learner, rows, 4, "fp32"))
    for row, total, predicted in zip(rows, found, listed, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt, *row.answer]])).logits[0]
        every = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
        own = every.gather(1, torch.tensor(row.answer)[:, None])[:, 0]
        assert total == pytest.approx(float(own.sum()), abs=1e-3)
        assert predicted.own.tolist() == pytest.approx(own.tolist(), abs=1e-4)
        top = every.topk(4)
        assert predicted.ids.tolist() == top.indices.tolist()
        assert predicted.logprobs.ravel().tolist() == pytest.approx(
            top.values.ravel().tolist(), abs=1e-4
        )


def test_a_new_adapter_changes_nothing_that_is_said(pupil: Pupil, student: Student) -> None:
    from edgedistill.distill.model import save_adapter, trained_model

    folder = student.folder.parent / "adapter"
    save_adapter(trained_model(student.folder, SPEC), folder, student)
    rows = rows_of_lengths(9, 14)
    told = []
    for start in (None, folder):
        with asked(pupil.job(start=start)) as learner:
            told.append(log_likelihoods(learner, rows, "fp32"))
    assert told[0] == pytest.approx(told[1], abs=1e-4)


@pytest.mark.parametrize(
    ("answer", "longest", "fits"),
    [("the one", 200, True), ("", 200, False), ("a<|im_end|>b", 200, False), ("the one", 8, False)],
)
def test_an_answer_that_cannot_be_learnt_is_left_out(
    pupil: Pupil, answer: str, longest: int, fits: bool
) -> None:
    assert usable(pupil.rows()[0], answer, pupil.job().shown(), longest) == fits


def test_answers_are_cleaned_as_the_job_says(pupil: Pupil) -> None:
    plain: Job = pupil.job()
    as_teacher: Job = pupil.job(cleaning=CurateSpec())
    assert plain.cleaned(" ```\nx\n``` ") == "```\nx\n```"
    assert as_teacher.cleaned(" ```\nx\n``` ") == "x"
    assert as_teacher.exam().cleaned("```\nx\n```") == "x"
