"""Distil: the student learns the teacher's answers, by one of the methods of methods.py."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Adapter,
    Dataset,
    Identity,
    Student,
    TokenTargets,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.check_specs import Check
from edgedistill.checks import check_identity
from edgedistill.distill.lesson import TRAINING, Job, Pupil, agreement_at, choose_step, lesson_rows
from edgedistill.fidelity import read_rows
from edgedistill.methods import DistillSpec
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.training.course import Trained
from edgedistill.training.data import TrainingRow, training_rows

__all__ = ["Assigned", "assigned", "choose_step", "distill", "trained", "with_precision"]

TOOLS = ("torch", "transformers", "peft", "accelerate", "tokenizers")


def distill(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
    out: Path,
    progress: Progress,
    targets: TokenTargets | None = None,
) -> Adapter:
    """Stage "distill", and before it "precision" (`with_precision`). A method with a KL divergence
    needs its `targets`.

    The loss is on the answer and its stop token. The adapter is the last one, unless an earlier
    evaluation on validation rows was better by more than one prompt. A run that was cut off goes
    on from its last complete checkpoint and ends with the same bytes.

    Raises:
        DatasetError: there is nothing to train on.
        TrainingError: a row breaks a promise of supervision, or the training diverges.
    """
    given = assigned(dataset, student, prompt, spec, check, out, progress, targets)
    return trained(given, out, progress)


@dataclass(frozen=True)
class Assigned:
    """A training run and the identity of the stage "distill" that it makes."""

    identity: Identity
    job: Job


def assigned(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
    out: Path,
    progress: Progress,
    targets: TokenTargets | None = None,
) -> Assigned:
    """What `distill` would train, its precision settled.

    Raises:
        DatasetError, TrainingError: see `distill`.
    """
    spec = with_precision(dataset, student, prompt, spec, out, progress)
    job = Pupil(student, prompt, spec, check, dataset).job(
        targets=None if targets is None else targets.file,
        kl_weight=spec.kl_weight or 0.0,
        weighted=spec.begins_with == "proxy",
    )
    assert (targets is None) == (spec.kl_weight is None), "targets are of the method"
    lesson_rows(job)  # what cannot be trained on is refused before the folder is made
    job.exam()
    return Assigned(_identity(dataset, student, prompt, spec, check, targets), job)


def trained(given: Assigned, out: Path, progress: Progress) -> Adapter:
    """The adapter at the end of a run."""
    work = partial(learn, given.job, progress=progress)
    done = run_stage(given.identity, out, progress, work)
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

    if spec.tuning == "qlora":  # the only one that 4-bit weights are multiplied in
        return spec.model_copy(update={"precision": "bf16"})
    if spec.precision != "auto":
        return spec

    def rows() -> list[TrainingRow]:
        shown = StudentPrompt(student.folder, prompt)
        return training_rows(read_rows(dataset.folder / "train.jsonl"), shown, spec.max_length)

    chosen = choose_precision(rows, student, spec, out, progress)
    return spec.model_copy(update={"precision": chosen})


def learn(job: Job, folder: Path, progress: Progress) -> Mapping[str, Any]:
    """Train, and write the adapter and `training.json` into `folder`; the facts of the run."""
    from edgedistill.training.history import as_json

    done = run(job, folder, progress)
    for file in done.kept.iterdir():
        shutil.copyfile(file, folder / file.name)
    write_json(folder / TRAINING, as_json(done.points))
    last = done.facts["chosen_step"] == done.facts["steps"]
    agreement = agreement_at(done.points, done.facts["chosen_step"])
    return {
        **done.facts,
        "validation_agreement": agreement,
        **_unrounded(job, done.kept, agreement, progress),
        "precision": job.spec.precision,
        "chosen_because": (
            "the last step" if last else "an earlier step agreed on more than one validation "
            "prompt more"
        ),
        "train_rows": len(lesson_rows(job)),
        "validation_rows": len(job.exam().rows),
    }  # fmt: skip


def _unrounded(
    job: Job, adapter: Path, agreement: float | None, progress: Progress
) -> dict[str, float]:
    """What qlora's adapter does to weights that are not rounded to 4 bits, which it is merged
    into: it was not trained on those."""
    if job.spec.tuning != "qlora":
        return {}
    from edgedistill.distill.model import trained_model
    from edgedistill.torch_runtime import device

    plain = job.spec.model_copy(update={"tuning": "lora", "precision": "fp32"})
    model = trained_model(job.student.folder, plain, adapter).to(device()).eval()
    found = job.exam().take(model).agreement
    told = "" if agreement is None else f", and {agreement:.3f} on the 4-bit ones it learnt on"
    progress.note(f"qlora: validation agreement {found:.3f} on the weights it is merged into{told}")
    return {"validation_agreement_unrounded": found}


def run(job: Job, folder: Path, progress: Progress) -> Trained:
    """Train a job in `folder`, or go on from its last checkpoint there."""
    from edgedistill.distill.lesson import course_of
    from edgedistill.distill.together import train_together
    from edgedistill.training.trainer import train

    if job.spec.processes > 1:
        return train_together(job, folder, progress)
    return train(course_of(job, folder), folder, progress)


def _identity(
    dataset: Dataset,
    student: Student,
    prompt: StudentSpec,
    spec: DistillSpec,
    check: Check,
    targets: TokenTargets | None,
) -> Identity:
    inputs = {"dataset": dataset.digest, "student": student.digest}
    return Identity(
        stage="distill",
        version=2,
        spec={
            "distill": spec.shaping(),
            "prompt": prompt.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(check),
        },
        inputs=inputs if targets is None else {**inputs, "targets": targets.digest},
        tools=tool_versions(*TOOLS),
    )
