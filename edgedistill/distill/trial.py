"""A training run that may be left on its way, and what validation prompts say of it there.

What it has learnt stays below its stage folder's `resume`: `distill` with the same values goes on
from there, and its adapter is the same as if it had never been left.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    RESUME,
    Adapter,
    Identity,
    load_finished,
    run_stage,
    storing,
    tool_versions,
    write_json,
)
from edgedistill.distill import Assigned, run, trained
from edgedistill.distill.lesson import Job, lesson_rows
from edgedistill.errors import Diverged
from edgedistill.progress import Progress
from edgedistill.training.data import plan_batches
from edgedistill.training.history import EVALUATED, last_complete, step_of

EXAM = "exam.json"
NOT_FINITE = "what it predicts is not finite"
TOOLS = ("torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True)
class Sat:
    """An adapter's exam on validation prompts: `same` by row ID, the mean NLL of the teacher's
    answers in nats a token, and how long it took, with the training before it. Of a training that
    diverged only `diverged` tells."""

    same: Mapping[str, bool]
    nll: float
    seconds: float
    diverged: str = ""

    @property
    def right(self) -> int:
        """Prompts on which it agrees with the teacher."""
        return sum(self.same.values())

    @property
    def agreement(self) -> float:
        return self.right / len(self.same)


@dataclass(frozen=True)
class Trial:
    """One run, and the workspace that it is in."""

    given: Assigned
    root: Path

    @property
    def folder(self) -> Path:
        """Of the stage "distill"."""
        return self.given.identity.folder(self.root)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        spec = self.given.job.spec
        rows = lesson_rows(self.given.job)
        return len(plan_batches(rows, spec.batch_size, spec.epochs, spec.seed))

    @property
    def finished(self) -> bool:
        return load_finished(self.folder, reused=True) is not None

    def after(self, step: int, progress: Progress) -> Sat | None:
        """Train up to `step`, where it is left, and examine it; None where an earlier run trained
        further and kept nothing of this step."""
        identity = self._exam(step)
        if load_finished(identity.folder(self.root), reused=True) is None and self._is_past(step):
            return None

        def train() -> Path:
            if self._reached(step) and self._kept(step).is_dir():
                return self._kept(step)
            self.folder.mkdir(parents=True, exist_ok=True)
            job = self.given.job.model_copy(update={"until": step})
            with storing(self.folder):
                return run(job, self.folder, progress).kept

        return _sat(identity, self.given.job, self.root, train, progress)

    def at_end(self, progress: Progress) -> Sat:
        """Train to the end, as `distill` does, and examine what it chose.

        Raises:
            Diverged: the training came to nothing.
        """
        adapter = trained(self.given, self.root, progress)
        identity = self._exam("chosen", adapter)
        return _sat(identity, self.given.job, self.root, lambda: adapter.folder, progress)

    def _exam(self, step: int | str, adapter: Adapter | None = None) -> Identity:
        digests = {} if adapter is None else {"adapter": adapter.digest}
        return Identity(
            stage="exam",
            version=1,
            spec={"step": step},
            inputs={"distill": self.given.identity.key, **digests},
            tools=tool_versions(*TOOLS),
        )

    def _kept(self, step: int) -> Path:
        return self.folder / RESUME / EVALUATED / str(step)

    def _reached(self, step: int) -> bool:
        last = last_complete(self.folder / RESUME)
        return last is not None and step_of(last) >= step

    def _is_past(self, step: int) -> bool:
        return self.finished or (self._reached(step) and not self._kept(step).is_dir())


def _sat(
    identity: Identity, job: Job, root: Path, train: Callable[[], Path], progress: Progress
) -> Sat:
    """Stage "exam": of the adapter folder that `train` gives."""

    def work(folder: Path) -> dict[str, Any]:
        started = time.monotonic()
        try:
            same, nll = _examine(job, train())
            found = Sat(same, nll, 0.0) if math.isfinite(nll) else Sat({}, 0.0, 0.0, NOT_FINITE)
        except Diverged as error:
            found = Sat({}, 0.0, 0.0, str(error))
        value = asdict(found) | {"seconds": round(time.monotonic() - started, 3)}
        write_json(folder / EXAM, value)
        return {"nll": value["nll"], "diverged": value["diverged"]}

    done = run_stage(identity, root, progress, work)
    return Sat(**json.loads((done.folder / EXAM).read_text("utf-8")))


def _examine(job: Job, adapter: Path) -> tuple[dict[str, bool], float]:
    """Which answers are the teacher's, by row ID, and the NLL of the teacher's."""
    from edgedistill.distill.model import trained_model
    from edgedistill.torch_runtime import device
    from edgedistill.training.learner import Learner, nll_loss

    spec, exam = job.spec, job.exam()
    learner = Learner(trained_model(job.student.folder, spec, adapter), nll_loss).to(device())
    model = learner.eval().plain
    found = exam.samples_of(model, spec.precision)
    same = {row.id: sample.same for row, sample in zip(exam.rows, found, strict=True)}
    return same, exam.nll(model, spec.precision)
