"""The training run: Trainer with our loss, checkpoints that a crash cannot tear, validation."""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from edgedistill.artifacts import RESUME, Student, sync_files, write_atomic
from edgedistill.distill.data import IGNORED, TrainingRow, collate, padding_share, split_batch
from edgedistill.distill.model import autocast, lora_model, save_adapter, supervised_loss
from edgedistill.errors import TrainingError
from edgedistill.progress import Progress, Task
from edgedistill.recipe import DistillSpec
from edgedistill.results import TrainingPoint
from edgedistill.torch_runtime import device

COMPLETE = "complete"  # written last into a checkpoint: only then is it used again
EVALUATED = "evaluated"  # adapters as they were when validation agreement was measured
# A batch goes through the model in parts of about this many tokens: the gradient is the same, the
# activations in memory are not. Matrices of this many rows keep a core busy already.
PART_TOKENS = {"cpu": 512, "cuda": 16384}
AGREEMENT = "validation_agreement"


@dataclass(frozen=True)
class Plan:
    """All that decides a run. `agreement` answers the validation prompts with a model and returns
    its share of agreement with the teacher."""

    batches: Sequence[Sequence[TrainingRow]]
    batches_per_epoch: int
    student: Student
    spec: DistillSpec
    precision: str
    pad_id: int
    agreement: Callable[[Any], float]
    validation_rows: int

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def evaluated_steps(self) -> frozenset[int]:
        count = self.spec.evaluations
        return frozenset(max(1, math.ceil(self.steps * (i + 1) / count)) for i in range(count))


@dataclass(frozen=True)
class Trained:
    """The chosen adapter's folder (below `resume`), what was recorded, and facts."""

    adapter: Path
    points: list[TrainingPoint]
    facts: dict[str, Any]


def train(plan: Plan, folder: Path, progress: Progress) -> Trained:
    """Train, or go on from the last complete checkpoint below `folder/resume`.

    Raises:
        TrainingError: the loss is not finite.
    """
    resume = folder / RESUME
    resume.mkdir(parents=True, exist_ok=True)
    begin = last_complete(resume)
    model = lora_model(plan.student, plan.spec)
    with progress.task("train", plan.steps, "steps") as task:
        watcher = _Watcher(plan, resume, task)
        trainer = _SupervisedTrainer(
            precision=plan.precision,
            model=model,
            args=_arguments(plan, resume),
            train_dataset=list(plan.batches),
            data_collator=functools.partial(collate, pad_id=plan.pad_id),
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    points = training_points(trainer.state.log_history, plan.batches_per_epoch)
    chosen = choose_step(points, plan.validation_rows)
    return Trained(
        resume / EVALUATED / str(chosen), points, _facts(plan, watcher, model, chosen, begin)
    )


def last_complete(resume: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are removed."""
    found = []
    for folder in resume.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            found.append(folder)
        else:
            shutil.rmtree(folder)
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


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
        )
        for step, entry in sorted(steps.items())
        if "loss" in entry or AGREEMENT in entry
    ]


def _arguments(plan: Plan, resume: Path) -> Any:
    spec, on_cpu = plan.spec, device().type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(resume),
        max_steps=plan.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(spec.warmup_share * plan.steps),
        weight_decay=spec.weight_decay,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, math.ceil(plan.steps / spec.checkpoints)),
        save_total_limit=2,
        eval_strategy="no",
        seed=spec.seed,
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
    plan: Plan, watcher: _Watcher, model: Any, chosen: int, begin: Path | None
) -> dict[str, Any]:
    return {
        "steps": plan.steps,
        "precision": plan.precision,
        "device": str(device()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "padding_share": round(padding_share(plan.batches, PART_TOKENS[device().type]), 4),
        "supervised_tokens": sum(len(row.answer) for batch in plan.batches for row in batch),
        "chosen_step": chosen,
        "chosen_because": (
            "the last step"
            if chosen == plan.steps
            else "an earlier step agreed on more than one validation prompt more"
        ),
        "resumed_from_step": int(begin.name.split("-")[1]) if begin else 0,
        **watcher.timing(),
    }


class _SupervisedTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss on supervised positions only, a part of the batch at a time.

    Trainer takes no function for that. It runs in one process on one device.
    """

    def __init__(self, precision: str, **rest: Any) -> None:
        self._precision = precision
        super().__init__(**rest)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        batch = self._prepare_inputs(inputs)
        where, plain = self.args.device, self.accelerator.unwrap_model(model)
        supervised = (batch["labels"] != IGNORED).sum()
        total = supervised.new_zeros((), dtype=torch.float32)
        for part in split_batch(batch, PART_TOKENS[where.type]):
            with autocast(where, self._precision):
                loss = supervised_loss(plain, part, "sum") / supervised
            self.accelerator.backward(loss)
            total += loss.detach()
        if not total.isfinite():
            raise TrainingError(
                f"the loss is {float(total)} at step {self.state.global_step + 1}",
                hint="lower distill.learning_rate, or set distill.precision to fp32",
            )
        return total


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Advances the bar, measures validation agreement, and marks checkpoints complete."""

    def __init__(self, plan: Plan, resume: Path, task: Task) -> None:
        self._plan, self._resume, self._task = plan, resume, task
        self._tokens, self._seconds, self._begun = 0, 0.0, 0.0
        self._evaluating = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._task.advance(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        step = state.global_step
        self._seconds += time.perf_counter() - self._begun
        self._tokens += sum(map(len, self._plan.batches[step - 1]))
        if step in self._plan.evaluated_steps:
            self._evaluate(step, state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            rate = self._tokens / self._seconds
            self._task.advance(1, f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self._resume / f"checkpoint-{state.global_step}"
        sync_files(folder)
        write_atomic(folder / COMPLETE, b"")

    def timing(self) -> dict[str, float]:
        """Of this process only: steps done before a resume are not in it."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(self._seconds, 1),
            "evaluation_seconds": round(self._evaluating, 1),
        }

    def _evaluate(self, step: int, state: Any, model: Any) -> None:
        started = time.perf_counter()
        self._keep(step, model)
        model.eval()
        agreement = self._plan.agreement(model)
        model.train()
        # In the log, so that checkpoints carry it.
        state.log_history.append({"step": step, AGREEMENT: agreement})
        self._evaluating += time.perf_counter() - started

    def _keep(self, step: int, model: Any) -> None:
        whole = self._resume / EVALUATED / str(step)
        part = whole.with_name(f"{step}.part")
        for folder in (whole, part):  # of a run that died behind its last checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        save_adapter(model, part, self._plan.student)
        sync_files(part)
        os.replace(part, whole)


def as_json(points: Sequence[TrainingPoint]) -> list[dict[str, Any]]:
    """What `training.json` holds."""
    return [asdict(point) for point in points]
