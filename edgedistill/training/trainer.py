"""The training run: Trainer with our loss, and what it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from edgedistill.artifacts import RESUME
from edgedistill.errors import Diverged, TrainingError
from edgedistill.memory import freed_memory_kept
from edgedistill.progress import Progress
from edgedistill.torch_runtime import deterministic, device
from edgedistill.training.course import Course, Trained
from edgedistill.training.flops import peak_of
from edgedistill.training.history import (
    EVALUATED,
    Entry,
    history_of,
    is_over,
    last_complete,
    last_kept,
    step_of,
    training_points,
)
from edgedistill.training.processes import (
    is_first,
    shared,
    started_together,
    wait_for_all,
    world,
)
from edgedistill.training.reporters import reporting, require_reporters
from edgedistill.training.sharding import averaging, held_bytes, shard_frozen
from edgedistill.training.watcher import Watcher


def train(course: Course, folder: Path, progress: Progress) -> Trained:
    """Train, or go on from the last complete checkpoint below `folder/resume`.

    Raises:
        Diverged: the loss is not finite, or rises above where it began.
    """
    require_reporters(course.reporters)
    resume = folder / RESUME
    resume.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(course, resume)  # joins the other processes, where there are some
    if is_first():
        last_complete(resume)
    wait_for_all()
    begin = last_complete(resume)
    deterministic(course.schedule.seed)  # before the start is judged
    model, history = _placed(course), history_of(begin)
    with progress.task(course.label, course.until or course.steps, "steps") as task:
        watcher = Watcher(course, resume, task)
        with freed_memory_kept(), reporting(course.reporters, folder):
            if course.only_best and begin is None:
                history = watcher.judge_start(model)
            if not is_over(history, course):  # Trainer looks at that only behind one step more
                history = _run(course, model, watcher, arguments, begin)
    history = shared(history)  # the first process has the evaluations
    points = training_points(history, course.batches_per_epoch)
    chosen = course.choose(points) if course.until is None else course.until
    facts = _facts(course, watcher, model, points[-1].step, chosen, begin)
    return Trained(resume / EVALUATED / str(chosen), points, facts)


def _placed(course: Course) -> Any:
    model = course.build()
    if course.sharded and world() > 1:
        shard_frozen(model, device())
        return model
    return model.to(device())


def _run(
    course: Course, model: Any, watcher: Watcher, arguments: Any, begin: Path | None
) -> list[Entry]:
    """Every step from `begin` on; what is logged."""
    trainer = _OwnLossTrainer(
        course,
        model=model,
        args=arguments,
        train_dataset=list(course.batches),
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    watcher.tell = trainer.callback_handler.on_log
    trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    return list(trainer.state.log_history)


def _arguments(course: Course, resume: Path) -> Any:
    schedule, on_cpu = course.schedule, device().type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(resume),
        max_steps=course.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
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
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and started_together() else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        report_to=list(course.reporters),
        run_name=resume.parent.name,
        disable_tqdm=True,
    )
    # Trainer would put the batches of two steps on two GPUs, and count steps otherwise than here.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _facts(
    course: Course, watcher: Watcher, model: Any, steps: int, chosen: int, begin: Path | None
) -> dict[str, Any]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "steps": steps,
        "device": str(device()),
        "processes": world(),
        "weight_bytes": held_bytes(model),
        "trained_parameters": trained if steps else 0,
        "supervised_tokens": sum(
            row.supervised for batch in course.batches[:steps] for row in batch
        ),
        "chosen_step": chosen,
        "resumed_from_step": step_of(begin) if begin else 0,
        **course.facts,
        **watcher.timing(),
        **_of_gpu(watcher.flops_per_second() / world()),
    }


def _of_gpu(flops_per_second: float) -> dict[str, Any]:
    """Of one GPU, where there is one."""
    if device().type != "cuda":
        return {}
    name = torch.cuda.get_device_name()
    peak = peak_of(name)
    return {
        "gpu": name,
        "gpu_peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "model_flops_per_second": flops_per_second,
        "model_flops_utilisation": peak and round(flops_per_second / peak, 4),
    }


class _OwnLossTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the course's own batches and gradient. Trainer takes no functions for that."""

    def __init__(self, course: Course, **rest: Any) -> None:
        self._course = course
        super().__init__(**rest)

    def get_train_dataloader(self) -> Any:
        """Whole batches in their order, the same ones in each process: `collate` shares them
        out."""
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            shuffle=False,
            collate_fn=self._course.collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Where frozen weights are sharded, DDP of the rest alone: accelerate refuses to make
        it."""
        if getattr(model, "sharded", False):
            return averaging(model)
        return super()._wrap_model(model, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        batch = self._prepare_inputs(inputs)
        step, resume = self.state.global_step + 1, Path(self.args.output_dir)
        try:
            loss = self._course.backward(model, batch, self.accelerator.backward)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU has no memory left at step {step}: {str(error).splitlines()[0]}",
                hint="end what else uses it, set distill.gradient_checkpointing to on, or take "
                "distill.tuning qlora or shorter rows",
            ) from error
        if not loss.isfinite():
            raise Diverged(
                f"the loss is {float(loss)} at step {step}{last_kept(resume)}",
                hint=self._course.hint,
            )
        return loss
