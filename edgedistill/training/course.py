"""All that decides a training run, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.results import Sample, TrainingPoint

HINT = "lower distill.learning_rate, or set distill.precision to fp32"


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
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Course:
    """All that decides a run.

    A batch is a sequence of rows, or of whatever has their `supervised` tokens and
    length; `collate([batch])` makes tensors of it. `backward(model, batch, run_backward)` adds
    its gradient and returns its mean loss; `examine(model)` measures it on validation rows;
    `keep(model, folder)` writes what is wanted of it as it is now; `choose(points)` names the step
    whose kept folder is the result. With `only_best` it is asked after each evaluation, and must
    never come back to an earlier step; and nothing is trained where the start is `enough`.
    A run that is left at `until` has a checkpoint of that step, and its result is what it had
    learnt then.
    """

    batches: Sequence[Sequence[Any]]
    batches_per_epoch: int
    schedule: Schedule
    collate: Callable[[Sequence[Sequence[Any]]], dict[str, Any]]
    build: Callable[[], Any]
    backward: Callable[[Any, Mapping[str, Any], Callable[[Any], None]], Any]
    examine: Callable[[Any], Examined]
    keep: Callable[[Any, Path], None]
    choose: Callable[[Sequence[TrainingPoint]], int]
    saved: Callable[[Any], None] = lambda model: None  # told when a checkpoint is written
    only_best: bool = False  # judge the start too, and keep the best folder, not each
    enough: Callable[[Examined], bool] = lambda found: False
    uneven: float = 0.0  # so much more loss one batch has than another by what its rows are
    may_rise: bool = False  # the start is near the best, and the loss above it no sign of harm
    until: int | None = None  # the step behind which it is left, to be gone on with or not
    label: str = "train"
    hint: str = HINT
    reporters: tuple[str, ...] = ()  # names that transformers.Trainer knows
    sharded: bool = False  # frozen weights in shares, where there are several processes
    flops: Callable[[Sequence[Sequence[Any]]], float] | None = None  # of training on batches
    facts: Mapping[str, Any] = field(default_factory=dict)  # of how it is computed

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
