"""One training run: what is learnt from what, in a form that other processes can be told."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import RESUME, Dataset, Student, load_finished, write_json
from edgedistill.check_specs import Check
from edgedistill.checks import check_identity, make_checker
from edgedistill.checks.cleaning import clean_answer
from edgedistill.errors import DatasetError
from edgedistill.families import even_context
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.methods import DistillSpec
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import CurateSpec, StudentSpec
from edgedistill.results import TrainingPoint
from edgedistill.strict import Strict
from edgedistill.training.course import HINT, Schedule
from edgedistill.training.data import plan_batches, require_context, training_rows
from edgedistill.training.examine import Exam
from edgedistill.training.need import Cut, dimensions, fit_here

TRAINING = "training.json"


BEGUN = "parts.json"  # how the batches of a run are computed


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
    weighted: bool = False  # by how likely the model that made the targets finds each answer
    cleaning: CurateSpec | None = None  # of its answers; None: white space around them alone
    until: int | None = None  # the step behind which the run is left
    label: str = "train"
    hint: str = HINT  # where the training diverges

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
        samples, most = self.spec.samples, self.prompt.max_tokens
        return Exam(rows, self.shown(), most, checker, samples, self.cleaned)

    def cleaned(self, said: str) -> str:
        """An answer of the model as it is compared and learnt."""
        return said.strip() if self.cleaning is None else clean_answer(said, self.cleaning)


@dataclass(frozen=True)
class Pupil:
    """A model that learns what a dataset holds, by `spec` (its precision settled): the student, or
    the proxy, and how it is asked."""

    model: Student
    prompt: StudentSpec
    spec: DistillSpec
    check: Check
    dataset: Dataset
    cleaning: CurateSpec | None = None

    def job(self, **rest: Any) -> Job:
        """A run on its rows, or on `rows`; see Job."""
        given: dict[str, Any] = {
            "student": self.model,
            "prompt": self.prompt,
            "spec": self.spec,
            "check": self.check,
            "rows": self.dataset.folder / "train.jsonl",
            "validation": self.dataset.folder / "validation.jsonl",
            "cleaning": self.cleaning,
        }
        return Job(**{**given, **rest})

    def rows(self) -> list[EvalRow]:
        """The training rows."""
        return read_rows(self.dataset.folder / "train.jsonl")

    def identity(self) -> dict[str, Any]:
        """What of it shapes a result beside `spec`, for an identity's spec."""
        cleaning = self.cleaning and self.cleaning.model_dump(mode="json", exclude={"split"})
        return {
            "prompt": self.prompt.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(self.check),
            "cleaning": cleaning,
        }

    def computing(self) -> dict[str, str]:
        """In which arithmetic it is asked, for an identity's spec."""
        return {"precision": self.spec.precision, "tuning": self.spec.tuning}

    def inputs(self) -> dict[str, str]:
        """The same, for an identity's inputs."""
        return {"dataset": self.dataset.digest, "model": self.model.digest}


def lesson_rows(job: Job) -> list[Any]:
    """The rows of a job, tokenized.

    Raises:
        DatasetError: there are none.
        TrainingError: one breaks a promise of supervision, or is longer than the context.
    """
    made: list[Any]
    if job.pairs:
        from edgedistill.distill.pairs import read_pairs

        made = list(read_pairs(job.rows, job.shown(), job.spec.max_length))
        answers = [row for pair in made for row in (pair.chosen, pair.rejected) if row is not None]
    else:
        answers = made = training_rows(read_rows(job.rows), job.shown(), job.spec.max_length)
    config = json.loads((job.student.folder / "config.json").read_text("utf-8"))
    if "max_position_embeddings" in config:  # of families of ours, always
        require_context(answers, *even_context(config))
    return made


def course_of(job: Job, folder: Path) -> Any:
    """The course (training/course.py) of a job that is trained in a stage's folder."""
    from edgedistill.distill.model import save_adapter
    from edgedistill.training.course import Course
    from edgedistill.training.flops import model_flops
    from edgedistill.training.learner import backward

    spec, rows, exam = job.spec, lesson_rows(job), job.exam()
    found, fitting = dimensions(job.student.folder), fitted(job, rows, folder)
    loss, collate = _taught(job, fitting.tokens, rows)
    return Course(
        batches=plan_batches(rows, spec.batch_size, spec.epochs, spec.seed),
        batches_per_epoch=math.ceil(len(rows) / spec.batch_size),
        schedule=_schedule(spec),
        collate=collate,
        build=lambda: _built(job, loss, fitting.checkpointing),
        backward=functools.partial(backward, precision=spec.precision),
        examine=lambda learner: exam.take(learner.plain, spec.precision),
        keep=lambda learner, folder: save_adapter(learner.model, folder, job.student),
        choose=lambda points: choose_step(points, len(exam.rows)),
        until=job.until,
        # A row with a worse answer has DPO's loss, too, which begins with log 2.
        uneven=math.log(2) if job.pairs else 0.0,
        label=job.label,
        hint=job.hint,
        reporters=spec.report_to,
        sharded=spec.shard,
        flops=lambda batches: model_flops(found, batches, spec.tuning == "full"),
        facts={
            "part_tokens": fitting.tokens,
            "gradient_checkpointing": fitting.checkpointing,
            "estimated_bytes": fitting.bytes,
        },
    )


def fitted(job: Job, rows: Sequence[Any], folder: Path) -> Cut:
    """How the job's batches are computed on this machine, in the memory that is free now; a run
    that goes on computes them as it began, since other parts would round otherwise.

    Raises:
        TrainingError: memory does not suffice.
    """
    from edgedistill.torch_runtime import device

    found = fit_here(job.student.folder, job.spec, rows, device().type)
    file = folder / RESUME / BEGUN
    if file.is_file():
        return replace(found, **json.loads(file.read_text("utf-8")))
    write_json(file, {"tokens": found.tokens, "checkpointing": found.checkpointing})
    return found


def _schedule(spec: DistillSpec) -> Schedule:
    return Schedule(
        learning_rate=spec.learning_rate,
        warmup_share=spec.warmup_share,
        weight_decay=spec.weight_decay,
        evaluations=spec.evaluations,
        checkpoints=spec.checkpoints,
        seed=spec.seed,
    )


def _built(job: Job, loss: Any, checkpointing: bool) -> Any:
    from edgedistill.distill.model import trained_model
    from edgedistill.training.learner import Learner

    learner = Learner(trained_model(job.student.folder, job.spec, job.start), loss)
    if checkpointing:
        learner.compute_twice()
    if job.spec.compile:
        learner.compile_layers()
    return learner


def _taught(job: Job, tokens: int, rows: Sequence[Any]) -> tuple[Any, Any]:
    """The loss of a job, and what makes batches for it."""
    from edgedistill.distill.losses import PairPacker, TargetPacker, preferring, with_targets
    from edgedistill.training.learner import Packer, mean_weight, nll_loss
    from edgedistill.training.processes import rank, world

    share = tokens, rank(), world(), mean_weight(rows)
    if job.pairs:
        return preferring(job.beta), PairPacker(*share)
    if job.targets is not None:
        packer = TargetPacker(job.targets, job.weighted, *share)
        return with_targets(job.kl_weight), packer
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


def validation_agreement(adapter: Path) -> float:
    """What the adapter in a complete stage folder reached when it was chosen."""
    done = load_finished(adapter, reused=True)
    assert done is not None, "adapters are of complete stages"
    points = json.loads((adapter / TRAINING).read_text("utf-8"))
    return agreement_at([TrainingPoint(**each) for each in points], done.facts["chosen_step"])


def agreement_at(points: Sequence[TrainingPoint], step: int) -> float:
    """Validation agreement at a step that was evaluated."""
    found = next(point.validation_agreement for point in points if point.step == step)
    assert found is not None, "a chosen step was evaluated"
    return found


def write_rows(file: Path, rows: Sequence[EvalRow]) -> None:
    """What `read_rows` reads."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes("".join(lines).encode())
