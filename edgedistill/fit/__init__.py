"""Fit: a checkpoint trained on in the number formats that it will be stored in.

What stock quantization loses, a small student can mostly learn back while it computes with the
quantized values (quantization-aware training: Jacob et al. 2018, arXiv 1712.05877).
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgedistill import machine
from edgedistill.allocations import FitSpec
from edgedistill.artifacts import (
    Allocation,
    Checkpoint,
    Dataset,
    Identity,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.check_specs import Check
from edgedistill.checks import Checker, check_identity, make_checker
from edgedistill.errors import DatasetError, TrainingError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.fit.allocation import allocate
from edgedistill.fit.perturbed import perturbed_rows
from edgedistill.fit.proof import prove
from edgedistill.fit.sensitivity import measure_sensitivity
from edgedistill.methods import DistillSpec
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.results import TrainingPoint, told_apart
from edgedistill.tensors import read_layout
from edgedistill.training.data import TrainingRow, collate, plan_epochs, training_rows
from edgedistill.training.examine import Exam

__all__ = ["allocate", "fit", "measure_sensitivity", "prove"]

TRAINING = "training.json"
SAME = 0.05  # a share of the loss; assumption: less than a few dozen prompts can tell


def fit(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    allocation: Allocation,
    dataset: Dataset,
    prompt: StudentSpec,
    lesson: DistillSpec,
    spec: FitSpec,
    check: Check,
    out: Path,
    progress: Progress,
) -> Checkpoint | None:
    """Stage "fit": the latent fp32 weights whose quantized values answer best.

    The loss is the NLL of the teacher's text, plus KL(reference || fitted), plus the error of the
    hidden states, on training rows; without the NLL on altered prompts and on general text.
    `reference` is the unquantized student with the same vocabulary. The weights are those of one
    evaluation on validation rows, the start included: see `choose_step`. Where the start is closer
    to the reference than `spec.min_kld` no step is done. None where the start stays: then
    `checkpoint` is as good as fitted, unless that is the base student. Of the `lesson` the longest
    row and the precision count: steps are in bf16 where it says so, evaluations in fp32.

    Raises:
        DatasetError: there is nothing to train on or to choose by.
        TrainingError: a row breaks a promise of supervision, the loss is not finite, or the memory
            cannot suffice.
    """
    identity = Identity(
        stage="fit",
        version=7,
        spec={
            "fit": spec.resolved(),
            "max_length": lesson.max_length,
            "precision": lesson.precision,
            "prompt": prompt.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(check),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            "reference": reference.digest,
            "allocation": allocation.digest,
            "dataset": dataset.digest,
        },
        tools=tool_versions(
            "torch", "transformers", "accelerate", "tokenizers", "llama-cpp-python"
        ),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        shown = StudentPrompt(checkpoint.folder, prompt)
        rows = read_rows(dataset.folder / "train.jsonl")
        validation = read_rows(dataset.folder / "validation.jsonl")
        if not validation:
            raise DatasetError(
                "no validation rows are left to choose the fitted weights by",
                hint="raise curate.split.validation, or give more prompts",
            )
        return _Job(
            checkpoint, reference, allocation, rows, validation, shown, prompt, lesson, spec,
            make_checker(check), progress,
        ).run(folder)  # fmt: skip

    done = run_stage(identity, out, progress, work)
    if done.facts["start_stays"]:
        progress.note(_why_it_stays(done.facts, spec))
        return None
    return Checkpoint(done.folder, done.digest)


def require_memory(spec: FitSpec, folder: Path, there: int | None, *, trained: bool) -> None:
    """Refuse what the system would kill without a word; `there`: bytes, None where not known.

    Raises:
        TrainingError: tells what is needed at least.
    """
    needed = spec.least_bytes(read_layout(folder).parameters, trained=trained)
    if there is not None and needed > there:
        raise TrainingError(
            f"fitting takes {needed / 1e9:.1f} GB of memory at least, and this machine has "
            f"{there / 1e9:.1f}",
            where=str(folder),
            hint="leave fit out of the allocation in a copy of the target, or build where there is "
            "more memory or a GPU; all that was made is kept",
        )


def _why_it_stays(facts: Mapping[str, Any], spec: FitSpec) -> str:
    steps, kld = facts["steps"], facts["start_kld"]
    why = f"none of {steps} steps led to better weights"
    if not steps:
        shown, bound = told_apart(kld, spec.min_kld)
        why = (
            f"rounded, the student is {shown} nats a token from the unquantized one on altered "
            f"prompts, less than fit.min_kld ({bound}; 0 trains all the same)"
        )
    return f"not fitted, it stays as allocated: {why}"


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    reference: Checkpoint
    allocation: Allocation
    rows: list[EvalRow]
    validation: list[EvalRow]
    shown: StudentPrompt
    prompt: StudentSpec
    lesson: DistillSpec
    spec: FitSpec
    checker: Checker
    progress: Progress

    def run(self, folder: Path) -> Mapping[str, Any]:
        from edgedistill.fit.fitting import Teaching
        from edgedistill.training.history import as_json
        from edgedistill.training.trainer import train

        trained, there = not self.spec.may_stay, machine.memory_bytes()
        require_memory(self.spec, self.checkpoint.folder, there, trained=trained)
        teaching = Teaching(
            self.checkpoint.folder, self.reference.folder, self.allocation, self.spec,
            self.lesson.precision,
        )  # fmt: skip
        general = teaching.general(self._count("general"), self.progress)
        epochs = self._epochs(general)
        course = self._course(teaching, epochs)
        done = train(course, folder, self.progress)
        for file in self.checkpoint.folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != "manifest.json":
                shutil.copyfile(file, folder / file.name)
        shutil.copyfile(done.kept / "model.safetensors", folder / "model.safetensors")
        write_json(folder / TRAINING, as_json(done.points))
        answered = sum(not row.general for row in epochs[0])
        counts = {
            "train_rows": answered,
            "perturbed_rows": len(epochs[0]) - answered - len(general),
            "general_rows": len(general),
            "start_kld": done.points[0].validation_kld,
            "start_stays": self.spec.start == "merged" and not done.facts["chosen_step"],
        }
        return {**done.facts, **counts}

    def _count(self, kind: Literal["perturbed", "general"]) -> int:
        """Rows an epoch, beside the training rows, that are only compared."""
        spec = self.spec
        if not spec.compares:
            return 0  # they would teach nothing: no teacher said them
        share = spec.perturbed_share if kind == "perturbed" else spec.general_share
        return round(len(self.rows) * share / (1 - spec.perturbed_share - spec.general_share))

    def _epochs(self, general: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """The rows of each epoch; prompts are altered anew for each."""
        known = training_rows(self.rows, self.shown, self.lesson.max_length)
        count, seed = self._count("perturbed"), self.spec.seed
        return [
            [
                *known,
                *perturbed_rows(
                    self.rows, self.shown, count, self.lesson.max_length, f"{seed}-{epoch}"
                ),
                *general,
            ]
            for epoch in range(math.ceil(self.spec.epochs))
        ]

    def _altered(self) -> list[TrainingRow]:
        """Validation prompts with altered words, the same whatever the seed of the fitting."""
        if not self.spec.compares:
            return []  # then being like the unquantized student is not wanted
        rows = self.validation
        return perturbed_rows(rows, self.shown, len(rows), self.lesson.max_length, "validation")

    def _course(self, teaching: Any, epochs: list[list[TrainingRow]]) -> Any:
        from edgedistill.training.course import Course, Examined, Schedule

        spec = self.spec
        exam = Exam(self.validation, self.shown, self.prompt.max_tokens, self.checker)
        asked = self._batches(training_rows(self.validation, self.shown, None))
        altered = self._batches(self._altered())

        def examine(model: Any) -> Examined:
            model.refresh(exact=True)
            same = exam.take(model.model).agreement
            apart = teaching.kld(model.model, altered) if altered else None
            return Examined(same, teaching.nll(model.model, asked), apart)

        return Course(
            batches=self._batches_of(epochs),
            batches_per_epoch=math.ceil(len(epochs[0]) / spec.batch_size),
            schedule=Schedule(
                learning_rate=spec.rate,
                warmup_share=0.05,
                weight_decay=0.0,
                evaluations=spec.evaluations,
                checkpoints=spec.checkpoints,
                seed=spec.seed,
                patience=spec.patience,
            ),
            collate=functools.partial(collate, pad_id=self.shown.stop_id),
            build=teaching.build,
            backward=teaching.backward,
            examine=examine,
            keep=teaching.keep,
            choose=lambda points: choose_step(points, len(self.validation)),
            saved=lambda model: model.forget_scales(),
            only_best=True,
            enough=self._enough,
            label="fit",
            may_rise=True,
            hint="lower fit.learning_rate, or set distill.precision to fp32",
        )

    def _enough(self, found: Any) -> bool:
        """Whether a start that was examined is near enough; if not, it is trained."""
        spec = self.spec
        if spec.start == "merged" and found.kld is not None and found.kld < spec.min_kld:
            return True
        require_memory(spec, self.checkpoint.folder, machine.memory_bytes(), trained=True)
        return False

    def _batches_of(self, epochs: list[list[TrainingRow]]) -> list[list[TrainingRow]]:
        spec = self.spec
        planned = plan_epochs(epochs, spec.batch_size, spec.epochs, spec.seed)
        if spec.steps is not None and spec.steps < len(planned):
            self.progress.note(f"{spec.steps} of {len(planned)} steps are done: fit.max_steps")
        return planned[: spec.steps]

    def _batches(self, rows: list[TrainingRow]) -> list[dict[str, Any]]:
        size = self.spec.batch_size
        return [
            collate([rows[at : at + size]], self.shown.stop_id) for at in range(0, len(rows), size)
        ]


def choose_step(points: Sequence[TrainingPoint], validation_rows: int) -> int:
    """The last evaluation that is as good as any: its agreement no more than one standard error of
    a proportion below the highest (the one-standard-error rule: Breiman et al. 1984, section
    3.4.3), and its loss no more than SAME above the lowest of such. A few rows tell agreement
    coarsely, and the loss finely, but not that finely; the learning rate falls from one
    evaluation to the next, and with it what chance has in the weights. The start stays where
    nothing has a lower loss, unless its agreement is more than that error below the highest.

    The loss is the NLL of the teacher's answers plus the KL divergence on altered prompts: most
    validation prompts are worded like training ones, where a student that has become worse
    elsewhere is likelier than before.

    It is applied to one evaluation after the other, and never comes back to an earlier one.
    """
    measured = [
        (
            point.validation_agreement,
            (point.validation_nll or 0.0) + (point.validation_kld or 0.0),
            point.step,
        )
        for point in points
        if point.validation_agreement is not None
    ]
    start = kept = measured[0]
    highest, bound = start[0], start[1]
    for point in measured[1:]:
        highest = max(highest, point[0])
        floor = highest - math.sqrt(highest * (1 - highest) / validation_rows)
        low = point[1] < start[1] if kept is start else point[1] <= bound
        if kept[0] < floor:
            kept, bound = point, point[1] * (1 + SAME)
        elif point[0] >= floor and low:
            kept, bound = point, min(bound, point[1] * (1 + SAME))
    return kept[2]
