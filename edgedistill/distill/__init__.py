"""Distil: the student learns the teacher's answers (SeqKD, Kim and Rush 2016, arXiv 1606.07947)
through LoRA on all its linear layers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
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
from edgedistill.errors import DatasetError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Check, DistillSpec, StudentSpec
from edgedistill.results import TrainingPoint
from edgedistill.training.data import TrainingRow, plan_batches, training_rows
from edgedistill.training.examine import agreement

__all__ = ["distill", "with_precision"]

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
    """Stage "distill", and before it "precision" (`with_precision`).

    The loss is on the answer and its stop token. The adapter is the last one, unless an earlier
    evaluation on validation rows was better by more than one prompt. A run that was cut off goes
    on from its last complete checkpoint and ends with the same bytes.

    Raises:
        DatasetError: there is nothing to train on.
        TrainingError: a row breaks a promise of supervision, or the loss is not finite.
    """
    spec = with_precision(dataset, student, prompt, spec, out, progress)
    shown = StudentPrompt(student.folder, prompt)
    rows = training_rows(read_rows(dataset.folder / "train.jsonl"), shown, spec.max_length)
    validation = read_rows(dataset.folder / "validation.jsonl")
    if not validation:
        raise DatasetError(
            "no validation rows are left to choose an adapter by",
            hint="raise curate.split.validation, or give more prompts",
        )
    lesson = _Lesson(rows, validation, shown, prompt, make_checker(check))
    done = run_stage(
        _identity(dataset, student, prompt, spec, check),
        out,
        progress,
        lambda folder: _learn(lesson, student, spec, folder, progress),
    )
    return Adapter(folder=done.folder, digest=done.digest, steps=int(done.facts["steps"]))


def with_precision(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    out: Path,
    progress: Progress,
) -> DistillSpec:
    """The spec with the precision that trains faster on this machine in place of `auto`."""
    from edgedistill.distill.precision import choose_precision

    if spec.precision != "auto":
        return spec
    shown = StudentPrompt(student.folder, prompt)

    def rows() -> list[TrainingRow]:
        return training_rows(read_rows(dataset.folder / "train.jsonl"), shown, spec.max_length)

    chosen = choose_precision(rows, student, spec, shown.stop_id, out, progress)
    return spec.model_copy(update={"precision": chosen})


@dataclass(frozen=True)
class _Lesson:
    """What is learnt and how it is examined."""

    rows: list[TrainingRow]
    validation: list[EvalRow]
    shown: StudentPrompt
    prompt: StudentSpec
    checker: Checker


def _learn(
    lesson: _Lesson,
    student: Student,
    spec: DistillSpec,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    from edgedistill.distill.model import CONFIG, WEIGHTS
    from edgedistill.training.trainer import as_json, train

    course = _course(lesson, student, spec)
    done = train(course, folder, progress)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(done.kept / name, folder / name)
    write_json(folder / TRAINING, as_json(done.points))
    last = done.facts["chosen_step"] == course.steps
    return {
        **done.facts,
        "precision": spec.precision,
        "chosen_because": (
            "the last step" if last else "an earlier step agreed on more than one validation "
            "prompt more"
        ),
        "train_rows": len(lesson.rows),
        "validation_rows": len(lesson.validation),
    }  # fmt: skip


def _course(lesson: _Lesson, student: Student, spec: DistillSpec) -> Any:
    from edgedistill.distill.model import lora_model, save_adapter, supervised_loss
    from edgedistill.training.loss import in_parts
    from edgedistill.training.trainer import Course, Examined, Schedule

    rows = lesson.rows

    def backward(model: Any, batch: Any, run_backward: Callable[[Any], None]) -> Any:
        return in_parts(
            batch, spec.precision, run_backward, lambda part: supervised_loss(model, part, "sum")
        )

    def examine(model: Any) -> Examined:
        base = model.get_base_model()
        return Examined(
            agreement(
                base, lesson.validation, lesson.shown, lesson.prompt.max_tokens, lesson.checker
            )
        )

    return Course(
        batches=plan_batches(rows, spec.batch_size, spec.epochs, spec.seed),
        batches_per_epoch=math.ceil(len(rows) / spec.batch_size),
        schedule=Schedule(
            learning_rate=spec.learning_rate,
            warmup_share=spec.warmup_share,
            weight_decay=spec.weight_decay,
            evaluations=spec.evaluations,
            checkpoints=spec.checkpoints,
            seed=spec.seed,
        ),
        pad_id=lesson.shown.stop_id,
        build=lambda: lora_model(student, spec),
        backward=backward,
        examine=examine,
        keep=lambda model, folder: save_adapter(model, folder, student),
        choose=lambda points: choose_step(points, len(lesson.validation)),
    )


def choose_step(points: Sequence[TrainingPoint], validation_rows: int) -> int:
    """The last step, unless an earlier evaluation agreed on more than one validation prompt more:
    then the best of them, the later one when equal."""
    measured = [
        (round(point.validation_agreement * validation_rows), point.step)
        for point in points
        if point.validation_agreement is not None
    ]
    last, best = measured[-1], max(measured)
    return best[1] if best[0] > last[0] + 1 else last[1]


def _identity(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
) -> Identity:
    return Identity(
        stage="distill",
        version=1,
        spec={
            "distill": spec.model_dump(mode="json"),
            "prompt": prompt.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(check),
        },
        inputs={"dataset": dataset.digest, "student": student.digest},
        tools=tool_versions("torch", "transformers", "peft", "accelerate", "tokenizers"),
    )
