"""One training run: what is learnt from what, in a form that other processes can be told."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Student
from edgedistill.checks import make_checker
from edgedistill.errors import DatasetError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.methods import DistillSpec
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Check, StudentSpec
from edgedistill.results import TrainingPoint
from edgedistill.strict import Strict
from edgedistill.training.data import plan_batches, training_rows
from edgedistill.training.examine import Exam


class Job(Strict):
    """A run of `spec` (its precision settled) on the rows of a JSONL file. With `pairs` each row
    has a preferred answer; with `targets` there is, for each, what another model predicts."""

    student: Student
    prompt: StudentSpec
    spec: DistillSpec
    check: Check
    rows: Path
    validation: Path
    start: Path | None = None  # the adapter to go on from
    pairs: bool = False
    beta: float = 0.1  # of DPO, for pairs
    targets: Path | None = None
    kl_weight: float = 1.0  # of the targets
    label: str = "train"

    def shown(self) -> StudentPrompt:
        """How the student is asked."""
        return StudentPrompt(self.student.folder, self.prompt)

    def exam(self) -> Exam:
        """What it is examined with.

        Raises:
            DatasetError: there are no validation rows.
        """
        rows = read_rows(self.validation)
        if not rows:
            raise DatasetError(
                "no validation rows are left to choose an adapter by",
                hint="raise curate.split.validation, or give more prompts",
            )
        checker = make_checker(self.check)
        return Exam(rows, self.shown(), self.prompt.max_tokens, checker, self.spec.samples)


def lesson_rows(job: Job) -> list[Any]:
    """The rows of a job, tokenized.

    Raises:
        DatasetError: there are none.
        TrainingError: one breaks a promise of supervision.
    """
    if job.pairs:
        from edgedistill.distill.pairs import read_pairs

        return list(read_pairs(job.rows, job.shown(), job.spec.max_length))
    return list(training_rows(read_rows(job.rows), job.shown(), job.spec.max_length))


def course_of(job: Job) -> Any:
    """The course (training/course.py) of a job."""
    from edgedistill.distill.model import save_adapter
    from edgedistill.torch_runtime import device
    from edgedistill.training.course import Course, Schedule
    from edgedistill.training.flops import model_flops
    from edgedistill.training.learner import backward
    from edgedistill.training.need import cut, dimensions, free_bytes

    spec, rows, exam = job.spec, lesson_rows(job), job.exam()
    found, kind = dimensions(job.student.folder), device().type
    free = free_bytes(kind)
    share = free // spec.processes if free is not None and kind == "cpu" else free
    fitting = cut(found, spec, rows, kind, share)
    loss, collate = _taught(job, fitting.tokens)
    whole = spec.tuning == "full"
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
        collate=collate,
        build=lambda: _built(job, loss, fitting.checkpointing),
        backward=functools.partial(backward, precision=spec.precision),
        examine=lambda learner: exam.take(learner.plain, spec.precision),
        keep=lambda learner, folder: save_adapter(learner.model, folder, job.student),
        choose=lambda points: choose_step(points, len(exam.rows)),
        label=job.label,
        reporters=spec.report_to,
        flops=lambda batches: model_flops(found, batches, whole),
        facts={
            "part_tokens": fitting.tokens,
            "gradient_checkpointing": fitting.checkpointing,
            "estimated_bytes": fitting.bytes,
        },
    )


def _built(job: Job, loss: Any, checkpointing: bool) -> Any:
    from edgedistill.distill.model import trained_model
    from edgedistill.training.learner import Learner

    learner = Learner(trained_model(job.student.folder, job.spec, job.start), loss)
    if checkpointing:
        learner.compute_twice()
    return learner


def _taught(job: Job, tokens: int) -> tuple[Any, Any]:
    """The loss of a job, and what makes batches for it."""
    from edgedistill.distill.losses import PairPacker, preferring
    from edgedistill.training.learner import Packer, nll_loss
    from edgedistill.training.processes import rank, world

    share = tokens, rank(), world()
    if job.pairs:
        return preferring(job.beta), PairPacker(*share)
    return nll_loss, Packer(*share)


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


def write_rows(file: Path, rows: Sequence[EvalRow]) -> None:
    """What `read_rows` reads."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes("".join(lines).encode())
