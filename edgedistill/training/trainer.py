"""The training run: Trainer with our loss, checkpoints that a crash cannot tear, validation."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    enable_full_determinism,
)

from edgedistill.artifacts import RESUME, sync_files, write_atomic
from edgedistill.errors import TrainingError
from edgedistill.memory import freed_memory_kept, give_back
from edgedistill.progress import Progress, Task
from edgedistill.results import TrainingPoint
from edgedistill.torch_runtime import device
from edgedistill.training.data import TrainingRow, collate, padding_share

COMPLETE = "complete"  # written last into a checkpoint: only then is it used again
EVALUATED = "evaluated"  # what was kept when validation agreement was measured
# A batch goes through the model in parts of about this many tokens: the gradient is the same, the
# activations in memory are not. Matrices of this many rows keep a core busy already.
PART_TOKENS = {"cpu": 512, "cuda": 16384}
# Memory that steps freed goes back to the system so often. A fitting of 108 steps peaked at 7.3 GB
# instead of 8.7, and took no longer (1029 and 1055 seconds, one run each).
TRIMMED_STEPS = 8
AGREEMENT, NLL, KLD = "validation_agreement", "validation_nll", "validation_kld"


@dataclass(frozen=True)
class Schedule:
    """How long a run is, how fast it learns, and how often it looks at itself."""

    learning_rate: float
    warmup_share: float
    weight_decay: float
    evaluations: int
    checkpoints: int
    seed: int
    patience: int | None = None  # evaluations in a row without a better one that end the run


@dataclass(frozen=True)
class Examined:
    """Validation rows: share whose greedy answer is the teacher's, and, where they are looked at,
    in nats a token, the negative log-likelihood of the teacher's answers and the KL divergence
    from the unquantized student on altered prompts."""

    agreement: float
    nll: float | None = None
    kld: float | None = None


@dataclass(frozen=True)
class Course:
    """All that decides a run.

    `backward(model, batch, run_backward)` adds the gradient of one batch and returns its mean
    loss; `examine(model)` measures it on validation rows; `keep(model, folder)` writes what is
    wanted of it as it is now; `choose(points)` names the step whose kept folder is the result. With
    `only_best` it is asked after each evaluation, and must never come back to an earlier step; and
    nothing is trained where the start is `enough`.
    """

    batches: Sequence[Sequence[TrainingRow]]
    batches_per_epoch: int
    schedule: Schedule
    pad_id: int
    build: Callable[[], Any]
    backward: Callable[[Any, Mapping[str, Any], Callable[[Any], None]], Any]
    examine: Callable[[Any], Examined]
    keep: Callable[[Any, Path], None]
    choose: Callable[[Sequence[TrainingPoint]], int]
    saved: Callable[[Any], None] = lambda model: None  # told when a checkpoint is written
    only_best: bool = False  # judge the start too, and keep the best folder, not each
    enough: Callable[[Examined], bool] = lambda found: False
    label: str = "train"
    hint: str = "lower distill.learning_rate, or set distill.precision to fp32"

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def evaluated_steps(self) -> frozenset[int]:
        count = self.schedule.evaluations
        return frozenset(max(1, math.ceil(self.steps * (i + 1) / count)) for i in range(count))


@dataclass(frozen=True)
class Trained:
    """The folder of the chosen step (below `resume`), what was recorded, and facts."""

    kept: Path
    points: list[TrainingPoint]
    facts: dict[str, Any]


def train(course: Course, folder: Path, progress: Progress) -> Trained:
    """Train, or go on from the last complete checkpoint below `folder/resume`.

    Raises:
        TrainingError: the loss is not finite.
    """
    resume = folder / RESUME
    resume.mkdir(parents=True, exist_ok=True)
    begin = last_complete(resume)
    if device().type != "cpu":  # what Trainer does, but before the start is judged
        enable_full_determinism(course.schedule.seed)
    model, history = course.build().to(device()), _history(begin)
    with progress.task(course.label, course.steps, "steps") as task:
        watcher = _Watcher(course, resume, task)
        with freed_memory_kept():
            if course.only_best and begin is None:
                history = watcher.judge_start(model)
            if not _is_over(history, course):  # Trainer looks at that only behind one step more
                history = _run(course, model, watcher, resume, begin)
    points = training_points(history, course.batches_per_epoch)
    chosen = course.choose(points)
    facts = _facts(course, watcher, model, points[-1].step, chosen, begin)
    return Trained(resume / EVALUATED / str(chosen), points, facts)


def _history(begin: Path | None) -> list[dict[str, Any]]:
    """What was logged up to a checkpoint."""
    if begin is None:
        return []
    state = json.loads((begin / "trainer_state.json").read_text("utf-8"))
    return list(state["log_history"])


def _run(
    course: Course, model: Any, watcher: _Watcher, resume: Path, begin: Path | None
) -> list[dict[str, Any]]:
    """Every step from `begin` on; what is logged."""
    trainer = _OwnLossTrainer(
        course,
        model=model,
        args=_arguments(course, resume),
        train_dataset=list(course.batches),
        data_collator=functools.partial(collate, pad_id=course.pad_id),
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    return list(trainer.state.log_history)


def last_complete(resume: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are removed."""
    found = []
    for folder in resume.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            found.append(folder)
        else:
            shutil.rmtree(folder)
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def training_points(history: Sequence[dict[str, Any]], per_epoch: int) -> list[TrainingPoint]:
    """Trainer's log as one point a step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry["step"], {}).update(entry)
    return [
        TrainingPoint(
            step=step,
            epoch=round(step / per_epoch, 6),
            loss=entry.get("loss"),
            learning_rate=entry.get("learning_rate"),
            validation_agreement=entry.get(AGREEMENT),
            validation_nll=entry.get(NLL),
            validation_kld=entry.get(KLD),
        )
        for step, entry in sorted(steps.items())
        if "loss" in entry or AGREEMENT in entry
    ]


def _arguments(course: Course, resume: Path) -> Any:
    schedule, on_cpu = course.schedule, device().type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(resume),
        max_steps=course.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(schedule.warmup_share * course.steps),
        weight_decay=schedule.weight_decay,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, math.ceil(course.steps / schedule.checkpoints)),
        save_total_limit=2,
        eval_strategy="no",
        seed=schedule.seed,
        full_determinism=not on_cpu,  # a CPU is deterministic as it is, and slower with it
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
    )
    # Trainer would put the batches of two steps on two GPUs, and count steps otherwise than here.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _facts(
    course: Course, watcher: _Watcher, model: Any, steps: int, chosen: int, begin: Path | None
) -> dict[str, Any]:
    seen = course.batches[:steps]
    return {
        "steps": steps,
        "device": str(device()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)
        if steps
        else 0,
        "padding_share": round(padding_share(seen, PART_TOKENS[device().type]), 4),
        "supervised_tokens": sum(
            len(row.answer) for batch in seen for row in batch if not row.general
        ),
        "chosen_step": chosen,
        "resumed_from_step": int(begin.name.split("-")[1]) if begin else 0,
        **watcher.timing(),
    }


class _OwnLossTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the course's own gradient. Trainer takes no function for that.

    It runs in one process on one device.
    """

    def __init__(self, course: Course, **rest: Any) -> None:
        self._course = course
        super().__init__(**rest)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        batch, plain = self._prepare_inputs(inputs), self.accelerator.unwrap_model(model)
        loss = self._course.backward(plain, batch, self.accelerator.backward)
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}",
                hint=self._course.hint,
            )
        return loss


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Advances the bar, measures validation agreement, and marks checkpoints complete."""

    def __init__(self, course: Course, resume: Path, task: Task) -> None:
        self._course, self._resume, self._task = course, resume, task
        self._tokens, self._seconds, self._begun = 0, 0.0, 0.0
        self._evaluating = 0.0
        self._start: list[dict[str, Any]] = []  # the log of a run's start
        self._needed: int | None = None  # the step whose kept folder the last checkpoint leads to

    def judge_start(self, model: Any) -> list[dict[str, Any]]:
        """What there is to log before the first step."""
        self._evaluate(0, self._start, model)
        return list(self._start)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._task.advance(state.global_step)
        if self._start:
            state.log_history.extend(self._start)
        elif self._course.only_best:
            self._needed = _chosen(state.log_history, self._course)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        step = state.global_step
        if step % TRIMMED_STEPS == 0:
            give_back()
        self._seconds += time.perf_counter() - self._begun
        self._tokens += sum(map(len, self._course.batches[step - 1]))
        if step in self._course.evaluated_steps:
            self._evaluate(step, state.log_history, model)
            control.should_training_stop |= _gone_stale(state.log_history, self._course)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            rate = self._tokens / self._seconds
            self._task.advance(1, f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self._course.saved(model)
        folder = self._resume / f"checkpoint-{state.global_step}"
        sync_files(folder)
        write_atomic(folder / COMPLETE, b"")
        if self._course.only_best:
            self._needed = _chosen(state.log_history, self._course)

    def timing(self) -> dict[str, float]:
        """Of this process only: steps done before a resume are not in it."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(self._seconds, 1),
            "evaluation_seconds": round(self._evaluating, 1),
        }

    def _evaluate(self, step: int, history: list[dict[str, Any]], model: Any) -> None:
        started = time.perf_counter()
        model.eval()
        found = self._course.examine(model)
        model.train()
        # In the log, so that checkpoints carry it.
        history.append({"step": step, AGREEMENT: found.agreement, NLL: found.nll, KLD: found.kld})
        if not self._course.only_best or _chosen(history, self._course) == step:
            self._keep(step, model)
        self._evaluating += time.perf_counter() - started

    def _keep(self, step: int, model: Any) -> None:
        whole = self._resume / EVALUATED / str(step)
        part = whole.with_name(f"{step}.part")
        for folder in (whole, part):  # of a run that died behind its last checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
        self._course.keep(model, part)
        sync_files(part)
        os.replace(part, whole)
        # A run that goes on from the last checkpoint may round otherwise, and choose otherwise.
        needed = whole.with_name(str(self._needed))
        for other in whole.parent.iterdir() if self._course.only_best else ():
            if other not in (whole, needed):
                shutil.rmtree(other)


def _chosen(history: Sequence[dict[str, Any]], course: Course) -> int:
    """The step whose weights would be the result if the run ended here."""
    return course.choose(training_points(history, course.batches_per_epoch))


def _is_over(history: Sequence[dict[str, Any]], course: Course) -> bool:
    """Whether there is no step to do."""
    if history and history[-1]["step"] == 0:  # judged, and not trained yet
        start = history[-1]
        return course.enough(Examined(start[AGREEMENT], start[NLL], start[KLD]))
    return _gone_stale(history, course)


def _gone_stale(history: Sequence[dict[str, Any]], course: Course) -> bool:
    """Whether none of the last `patience` evaluations is the one that would be chosen.

    The start is left out: at the highest learning rate a model that lost little is worse than at
    its start, and at the end, when the rate has fallen, better.
    """
    patience, trained = course.schedule.patience, [e for e in history if e["step"] > 0]
    steps = [entry["step"] for entry in trained if AGREEMENT in entry]
    return (
        patience is not None
        and len(steps) > patience
        and _chosen(trained, course) not in steps[-patience:]
    )


def as_json(points: Sequence[TrainingPoint]) -> list[dict[str, Any]]:
    """What `training.json` holds."""
    return [asdict(point) for point in points]
