"""Looks on while Trainer trains: the bar, validation, checkpoints that a crash cannot tear."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from edgedistill.artifacts import sync_files, write_atomic
from edgedistill.errors import Diverged
from edgedistill.memory import give_back
from edgedistill.progress import Task
from edgedistill.training.course import Course
from edgedistill.training.history import (
    AGREEMENT,
    COMPLETE,
    EVALUATED,
    KLD,
    NLL,
    Entry,
    chosen,
    entry,
    gone_stale,
    last_kept,
    losses_of,
    risen,
)
from edgedistill.training.processes import is_first, shared, wait_for_all
from edgedistill.training.sharding import whole_layers

# Memory that steps freed goes back to the system so often. A fitting of 108 steps peaked at 7.3 GB
# instead of 8.7, and took no longer (1029 and 1055 seconds, one run each).
TRIMMED_STEPS = 8


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Advances the bar, measures validation agreement, and marks checkpoints complete."""

    def __init__(self, course: Course, resume: Path, task: Task) -> None:
        self._course, self._resume, self._task = course, resume, task
        self._tokens, self._seconds, self._begun = 0, 0.0, 0.0
        self._evaluating = 0.0
        self._seen: list[Any] = []
        self.tell: Callable[..., Any] = lambda *told: None  # passes figures on to trackers
        self._start: list[Entry] = []  # the log of a run's start
        self._needed: int | None = None  # the step whose kept folder the last checkpoint leads to

    def judge_start(self, model: Any) -> list[Entry]:
        """What there is to log before the first step."""
        self._evaluate(0, self._start, model)
        return list(self._start)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._task.advance(state.global_step)
        if self._start:
            state.log_history.extend(self._start)
        elif self._course.only_best:
            self._needed = chosen(state.log_history, self._course)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        step = state.global_step
        if step % TRIMMED_STEPS == 0:
            give_back()
        self._seconds += time.perf_counter() - self._begun
        self._seen.append(self._course.batches[step - 1])
        self._tokens += sum(map(len, self._seen[-1]))
        if step in self._course.evaluated_steps:
            self._evaluate(step, state.log_history, model)
            self._report(args, state, control)
            stale = gone_stale(state.log_history, self._course) if is_first() else False
            control.should_training_stop |= shared(stale)
        elif step == self._course.until and is_first():
            self._keep(step, model)
        control.should_save |= step == self._course.until

    def _report(self, args: Any, state: Any, control: Any) -> None:
        """Tell trackers what the evaluation found."""
        if is_first():
            found = state.log_history[-1]
            known = {n: found[n] for n in (AGREEMENT, NLL, KLD) if found[n] is not None}
            wanted = control.should_log  # telling clears it, and the step's loss is still to come
            self.tell(args, state, control, known)
            control.should_log = wanted

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            rate = self._tokens / self._seconds
            self._task.advance(1, f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")
            self._require_progress(state)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self._course.saved(model)
        wait_for_all()  # each process writes the state of its random numbers
        if is_first():
            folder = self._resume / f"checkpoint-{state.global_step}"
            sync_files(folder)
            write_atomic(folder / COMPLETE, b"")
        if self._course.only_best:
            self._needed = chosen(state.log_history, self._course)
        # Only now: a checkpoint written later than that would say that the training is over.
        control.should_training_stop |= state.global_step == self._course.until

    def timing(self) -> dict[str, float]:
        """Of this process only: steps done before a resume are not in it."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(self._seconds, 1),
            "evaluation_seconds": round(self._evaluating, 1),
        }

    def flops_per_second(self) -> float:
        """Model FLOPs of this process's steps over their time; 0 where they are not counted."""
        counted = self._course.flops
        return counted(self._seen) / self._seconds if counted and self._seconds else 0.0

    def _require_progress(self, state: Any) -> None:
        found = (
            None
            if self._course.may_rise
            else risen(losses_of(state.log_history), self._course.uneven)
        )
        if found is None:
            return
        raise Diverged(
            f"training diverges: the loss was {found[0]:.3g} at the start, and is {found[1]:.3g} "
            f"at step {state.global_step}{last_kept(self._resume)}",
            hint=self._course.hint,
        )

    def _evaluate(self, step: int, history: list[Entry], model: Any) -> None:
        started = time.perf_counter()
        model.eval()
        with whole_layers(model):
            if is_first():
                history.append(entry(step, self._course.examine(model)))
                if not self._course.only_best or chosen(history, self._course) == step:
                    self._keep(step, model)
            wait_for_all()
        model.train()
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
