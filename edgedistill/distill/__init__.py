"""Distil: the student learns the teacher's answers (SeqKD, Kim and Rush 2016, arXiv 1606.07947)
through LoRA on all its linear layers."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Adapter,
    Dataset,
    Identity,
    Student,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.checks import Checker, check_identity, make_checker
from edgedistill.distill.data import TrainingRow, plan_batches, training_rows
from edgedistill.errors import DatasetError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Check, DistillSpec, StudentSpec

__all__ = ["distill"]

TRAINING = "training.json"


def distill(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
    out: Path,
    progress: Progress,
) -> Adapter:
    """Stage "distill", and before it "precision" where the recipe says `auto`.

    The loss is on the answer and its stop token. The adapter is the last one, unless an earlier
    evaluation on validation rows was better by more than one prompt. A run that was cut off goes
    on from its last complete checkpoint and ends with the same bytes.

    Raises:
        DatasetError: there is nothing to train on.
        TrainingError: a row breaks a promise of supervision, or the loss is not finite.
    """
    from edgedistill.distill.precision import choose_precision

    shown = StudentPrompt(student.folder, prompt)
    rows = training_rows(read_rows(dataset.folder / "train.jsonl"), shown, spec.max_length)
    validation = read_rows(dataset.folder / "validation.jsonl")
    if not validation:
        raise DatasetError(
            "no validation rows are left to choose an adapter by",
            hint="raise curate.split.validation, or give more prompts",
        )
    precision = choose_precision(rows, student, spec, shown.stop_id, out, progress)
    lesson = _Lesson(rows, validation, shown, prompt, make_checker(check))
    done = run_stage(
        _identity(dataset, student, prompt, spec, check, precision),
        out,
        progress,
        lambda folder: _learn(lesson, student, spec, precision, folder, progress),
    )
    return Adapter(folder=done.folder, digest=done.digest, steps=int(done.facts["steps"]))


@dataclass(frozen=True)
class _Lesson:
    """What is learnt and how it is examined."""

    rows: list[TrainingRow]
    validation: list[EvalRow]
    shown: StudentPrompt
    prompt: StudentSpec
    checker: Checker

    def agreement(self, model: Any) -> float:
        """Share of validation rows on which the model's greedy answer is the teacher's."""
        from edgedistill.torch_runtime import generate

        shown = self.shown
        asked = [shown.prompt_ids(row.prompt, row.history) for row in self.validation]
        made = generate(model.get_base_model(), asked, self.prompt.max_tokens, shown.stop_ids)
        same = [
            self.checker.same(shown.decode(ids).strip(), row.answer)
            for ids, row in zip(made, self.validation, strict=True)
        ]
        return sum(same) / len(same)


def _learn(
    lesson: _Lesson,
    student: Student,
    spec: DistillSpec,
    precision: str,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    from edgedistill.distill.model import CONFIG, WEIGHTS
    from edgedistill.distill.trainer import Plan, as_json, train

    rows, validation = lesson.rows, lesson.validation
    plan = Plan(
        batches=plan_batches(rows, spec.batch_size, spec.epochs, spec.seed),
        batches_per_epoch=math.ceil(len(rows) / spec.batch_size),
        student=student,
        spec=spec,
        precision=precision,
        pad_id=lesson.shown.stop_id,
        agreement=lesson.agreement,
        validation_rows=len(validation),
    )
    done = train(plan, folder, progress)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(done.adapter / name, folder / name)
    write_json(folder / TRAINING, as_json(done.points))
    return {**done.facts, "train_rows": len(rows), "validation_rows": len(validation)}


def _identity(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
    precision: str,
) -> Identity:
    return Identity(
        stage="distill",
        version=1,
        spec={
            "distill": {**spec.model_dump(mode="json"), "precision": precision},
            "prompt": prompt.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(check),
        },
        inputs={"dataset": dataset.digest, "student": student.digest},
        tools=tool_versions("torch", "transformers", "peft", "accelerate", "tokenizers"),
    )
