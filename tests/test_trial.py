"""A run that is left on its way, and gone on with, is as one that never was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_dataset, tiny_student

from edgedistill.artifacts import Dataset, Student
from edgedistill.check_specs import TextCheck
from edgedistill.distill import assigned, distill
from edgedistill.distill.trial import Trial
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec

PROMPT = StudentSpec(weights="tiny", max_tokens=4)
SPEC = DistillSpec(
    lora=LoraSpec(rank=4, alpha=8, dropout=0.1),  # dropout: the RNG must survive
    batch_size=2,
    epochs=4,
    learning_rate=1e-3,
    precision="fp32",
    evaluations=2,
)
CHECK = TextCheck(kind="exact")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8)


def trial(student: Student, dataset: Dataset, root: Path, spec: DistillSpec = SPEC) -> Trial:
    given = assigned(dataset, student, PROMPT, spec, CHECK, root, Silent())
    return Trial(given, root)


def test_left_twice_it_ends_with_the_same_bytes(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    once = distill(dataset, student, PROMPT, SPEC, CHECK, tmp_path / "once", Silent())
    tried = trial(student, dataset, tmp_path / "left")
    assert tried.steps == once.steps == 16
    for step in (6, 8, 11):  # in between, at an evaluation, behind one
        found = tried.after(step, Silent())
        assert found is not None
        assert len(found.same) == 8
        assert not tried.finished
    end = tried.at_end(Silent())
    made = distill(dataset, student, PROMPT, SPEC, CHECK, tmp_path / "left", Silent())
    assert made.digest == once.digest
    assert made.folder.name == once.folder.name
    points = json.loads((made.folder / "training.json").read_text("utf-8"))
    assert end.agreement == points[-1]["validation_agreement"]


def test_each_exam_is_taken_once(student: Student, dataset: Dataset, tmp_path: Path) -> None:
    tried = trial(student, dataset, tmp_path)
    first = tried.after(4, Silent())
    tried.after(6, Silent())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("exam-*/exam.json")}
    assert trial(student, dataset, tmp_path).after(4, Silent()) == first
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("exam-*/exam.json")}


def test_exam_of_what_was_kept_needs_no_training(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    tried = trial(student, dataset, tmp_path)
    first = tried.after(4, Silent())
    assert first is not None
    exam = next(tmp_path.glob("exam-*/exam.json"))
    (exam.parent / "manifest.json").unlink()  # killed between the training and the exam
    again = tried.after(4, Silent())
    assert again is not None
    assert replace(again, seconds=first.seconds) == first
    assert (tried.folder / "resume" / "checkpoint-4").is_dir()


def test_a_step_that_an_earlier_run_went_past_is_not_examined(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    tried = trial(student, dataset, tmp_path)
    assert tried.after(8, Silent()) is not None
    assert tried.after(5, Silent()) is None
    tried.at_end(Silent())
    assert tried.after(9, Silent()) is None


def test_a_training_that_diverges_is_told_and_not_tried_again(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    wild = SPEC.model_copy(update={"learning_rate": 1e30})
    tried = trial(student, dataset, tmp_path, wild)
    found = tried.after(6, Silent())
    assert found is not None
    assert "the loss is" in found.diverged
    assert tried.after(6, Silent()) == found
