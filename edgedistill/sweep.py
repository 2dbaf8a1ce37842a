"""sweep: learning rate, rank and epochs, tried on a small grid; early losers are left.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): at each rung, a share of its own
steps, every trial is examined, and the worse half is left. All is decided on validation prompts.
Each trial is the stage "distill" of a recipe with its values, so a build goes on where it was left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgedistill.artifacts import (
    Finished,
    Identity,
    load_finished,
    run_stage,
    write_atomic,
    write_json,
)
from edgedistill.distill.trial import Sat, Trial
from edgedistill.errors import Diverged, TrainingError, UsageError
from edgedistill.learning import first_run
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.pipeline import Prepared, prepared
from edgedistill.progress import Progress
from edgedistill.recipe import Recipe
from edgedistill.recorder import Recorder
from edgedistill.sizes import known_dimensions, rank_problem
from edgedistill.tuning import scope_of
from edgedistill.tuning_results import Comparison, Sweep, SweepTrial, TrialExam
from edgedistill.workspace import locked

FIRST_RUNG = 1 / 3  # of a trial's own steps
AROUND = (0.5, 1.0, 2.0)  # times the recipe's learning rate
MOST_TRIALS = 64
FOUND, PAGE = "sweep.json", "sweep.html"


@dataclass(frozen=True)
class Grid:
    """The values to try; an empty list stands for the recipe's own, or learning rates around it."""

    learning_rates: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    epochs: tuple[float, ...] = ()


def sweep(recipe: Recipe, grid: Grid, root: Path, progress: Progress) -> Finished:
    """Stage "sweep": its facts are a Sweep as JSON, its files `sweep.json` and `sweep.html`.

    What the trials learn from is made first where the workspace `root` has it not. The recipe's own
    values are always tried, to their end: they are what the best is compared with.

    Raises:
        UsageError: a value that no recipe could have, too many of them, or a rank that is above a
            layer's width as far as the student is here to tell.
        TrainingError: every trial diverged, or a rank is above a layer's width.
    """
    specs = specs_of(recipe.distill, grid)
    require_known_ranks(recipe, grid)
    with locked(root):
        log = Recorder(progress)
        ready = prepared(recipe, root, log)
        assert ready is not None  # it ends early only when it is told to
        _require_ranks(ready, specs)
        entries = [_Entry(_trial(recipe, spec, ready, root, log), spec) for spec in specs]
        entries[0].own = True
        race = _Race(recipe, entries, shares_of(len(entries)), log)
        identity = Identity(
            stage="sweep",
            version=1,
            spec={
                "scope": scope_of("sweep", recipe, ready.dataset, ready.student),
                "trials": [entry.trial.given.identity.key for entry in entries],
                "rungs": race.shares,
                "recipe": recipe.name,
                "bench": recipe.bench.model_dump(mode="json", include={"bootstrap", "seed"}),
            },
            inputs={"dataset": ready.dataset.digest, "student": ready.student.digest},
        )
        return run_stage(identity, root, log, race.run)


def specs_of(spec: DistillSpec, grid: Grid) -> list[DistillSpec]:
    """What is tried: the recipe's own values first, then every other combination.

    alpha goes with the rank, so that an update is scaled as the recipe scales it: else another rank
    would also be another learning rate.

    Raises:
        UsageError: a value that no recipe could have, too many, or ranks where none is trained.
    """
    if grid.ranks and spec.tuning == "full":
        raise UsageError("--rank: distill.tuning is full: every weight is trained, at no rank")
    rates = grid.learning_rates or tuple(spec.learning_rate * each for each in AROUND)
    ranks, epochs = grid.ranks or (spec.lora.rank,), grid.epochs or (spec.epochs,)
    made = [
        _with_values(spec, *values)
        for values in itertools.product(dict.fromkeys(rates), ranks, epochs)
    ]
    found = [spec, *(each for each in _unique(made) if each != spec)]
    if len(found) > MOST_TRIALS:
        raise UsageError(
            f"--learning-rate, --rank and --epochs make {len(found)} trials, and a sweep takes "
            f"{MOST_TRIALS} at most",
            hint="vary fewer values at a time",
        )
    return found


def _unique(specs: Iterable[DistillSpec]) -> list[DistillSpec]:
    return list({spec.model_dump_json(): spec for spec in specs}.values())


def _with_values(spec: DistillSpec, rate: float, rank: int, epochs: float) -> DistillSpec:
    share = rank / spec.lora.rank
    alpha = spec.lora.alpha * (math.sqrt(share) if spec.tuning == "rslora" else share)
    lora = spec.lora.model_dump() | {"rank": rank, "alpha": alpha}
    values = {"learning_rate": rate, "epochs": epochs, "lora": lora}
    try:
        return DistillSpec.model_validate(spec.model_dump() | values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "distill." + ".".join(map(str, first["loc"]))
        raise UsageError(f"{where} cannot be {first['input']}: {first['msg']}") from error


def shares_of(trials: int) -> list[float]:
    """The rungs, as shares of a trial's steps: as many as halvings leave one of so many, from
    FIRST_RUNG on, each as many times the last."""
    count = math.ceil(math.log2(trials)) if trials > 1 else 0
    return [FIRST_RUNG ** (1 - rung / count) for rung in range(count)]


def require_known_ranks(recipe: Recipe, grid: Grid) -> None:
    """Refuse a rank above a layer's width before the teacher is asked, where the width is known.

    Raises:
        UsageError: names the student and how wide it is.
    """
    weights = recipe.student.weights
    found = known_dimensions(weights) if grid.ranks else None
    for rank in grid.ranks:
        if wrong := rank_problem(LoraSpec(rank=rank), weights, found):
            hint = f"try ranks of at most {found.narrowest}" if found else None
            raise UsageError(f"--rank {wrong}", hint=hint)


def _require_ranks(ready: Prepared, specs: Sequence[DistillSpec]) -> None:
    from edgedistill.distill.model import require_rank_of

    if specs[0].tuning != "full":
        require_rank_of(ready.student.folder, max((s.lora for s in specs), key=lambda x: x.rank))


def _trial(
    recipe: Recipe, spec: DistillSpec, ready: Prepared, root: Path, log: Progress
) -> Trial:  # fmt: skip
    varied = recipe.model_copy(update={"distill": spec})
    given = first_run(varied, ready.traces, ready.dataset, ready.student, root, log)
    return Trial(given, root)


@dataclass
class _Entry:
    """A trial, and how it fares."""

    trial: Trial
    spec: DistillSpec
    own: bool = False
    exams: list[TrialExam] = field(default_factory=list)
    last: Sat | None = None
    stopped_at: int | None = None
    why: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        rank = "" if self.spec.tuning == "full" else f", rank {self.spec.lora.rank}"
        rate, epochs = plain(self.spec.learning_rate), plain(self.spec.epochs)
        return f"learning rate {rate}{rank}, epochs {epochs}"

    def sit(self, step: int, take: Callable[[], Sat | None]) -> bool:
        """Take an exam; whether there is a result."""
        try:
            found = take()
        except Diverged as error:
            found = Sat({}, 0.0, 0.0, str(error))
        if found is None:
            return False
        self.last, self.seconds = found, self.seconds + found.seconds
        if found.diverged:
            self.leave(step, f"diverged: {found.diverged}")
        else:
            self.exams.append(TrialExam(step, found.agreement, found.nll))
        return True

    def leave(self, step: int, why: str) -> None:
        self.stopped_at, self.why = step, why

    def to_end(self, progress: Progress) -> None:
        self.sit(self.trial.steps, partial(self.trial.at_end, progress))
        done = load_finished(self.trial.folder, reused=True)
        self.seconds += done.manifest["wall_seconds"] if done else 0.0

    def result(self) -> SweepTrial:
        whole = self.spec.tuning == "full"
        return SweepTrial(
            learning_rate=self.spec.learning_rate,
            rank=None if whole else self.spec.lora.rank,
            alpha=None if whole else self.spec.lora.alpha,
            epochs=self.spec.epochs,
            own=self.own,
            steps=self.trial.steps,
            folder=self.trial.folder.name,
            exams=self.exams,
            stopped_at=self.stopped_at,
            why=self.why,
            seconds=round(self.seconds, 1),
        )


@dataclass(frozen=True)
class _Race:
    """The trials of one sweep."""

    recipe: Recipe
    entries: Sequence[_Entry]
    shares: Sequence[float]
    progress: Progress

    def run(self, folder: Path) -> dict[str, Any]:
        """The work of the stage."""
        running = list(self.entries)
        for rung, share in enumerate(self.shares, 1):
            if len(running) > 1:
                running = self._rung(running, share)
                told = f"rung {rung}, {100 * share:.0f} % of the steps: {len(running)} go on"
                self.progress.note(f"{told}: {'; '.join(entry.name for entry in running)}")
        ending = [each for each in self.entries if each in running or (each.own and not each.why)]
        for entry in ending:
            self._tell(entry, entry.trial.steps)
            entry.to_end(self.progress)
        found = self._found([entry for entry in ending if not entry.why])
        from edgedistill.report.tuning import sweep_page

        value = found.to_json()
        write_json(folder / FOUND, value)
        write_atomic(folder / PAGE, sweep_page(value).encode())
        return value

    def _tell(self, entry: _Entry, step: int) -> None:
        place = f"trial {self.entries.index(entry) + 1} of {len(self.entries)}"
        self.progress.note(f"{place}, {entry.name}: up to step {step} of {entry.trial.steps}")

    def _rung(self, running: Sequence[_Entry], share: float) -> list[_Entry]:
        """Those that go on: the better half, and those that earlier commands trained further."""
        examined, passing = list[_Entry](), list[_Entry]()
        for entry in running:
            step = step_at(share, entry.trial.steps)
            self._tell(entry, step)
            sat = entry.sit(step, partial(entry.trial.after, step, self.progress))
            (examined if sat else passing).append(entry)
        better = ranked([entry for entry in examined if not entry.why])
        kept = better[: math.ceil(len(examined) / 2)]
        for place, entry in enumerate(better[len(kept) :], len(kept) + 1):
            if not entry.own:
                step = step_at(share, entry.trial.steps)
                entry.leave(step, f"number {place} of {len(examined)} behind {100 * share:.0f} %")
        return [entry for entry in running if entry in passing or entry in kept]

    def _found(self, ended: Sequence[_Entry]) -> Sweep:
        from edgedistill.bench.agreement import bootstrap

        if not ended:
            raise TrainingError(
                f"every trial came to nothing; the first: {self.entries[0].why}",
                hint="try lower learning rates: --learning-rate",
            )
        best, bench = ranked(ended)[0], self.recipe.bench
        assert best.last is not None
        flags = list(best.last.same.values())
        against, said = self._against_own(best)
        interval = bootstrap(flags, bench.bootstrap, bench.seed)
        return Sweep(
            recipe=self.recipe.name,
            method=self.recipe.distill.begins_with,
            tuning=self.recipe.distill.tuning,
            prompts=len(flags),
            rungs=list(self.shares),
            trials=[entry.result() for entry in self.entries],
            winner=self.entries.index(best),
            agreement=interval,
            against_own=against,
            said=f"{best.name}: agreement {shown(interval)} on {len(flags)} validation prompts, "
            f"which chose it. {said}",
            lines=lines_of(best.spec),
        )

    def _against_own(self, best: _Entry) -> tuple[Comparison | None, str]:
        """The winner beside the recipe's own values, and in words."""
        from edgedistill.paired import compare

        own = self.entries[0]
        if best is own:
            return None, "These are the recipe's own values: nothing to change."
        if own.why:
            return None, f"The recipe's own values came to nothing ({own.why})."
        assert own.last is not None
        assert best.last is not None
        before = list(own.last.same.values())
        after = [best.last.same[row] for row in own.last.same]
        bench, others = self.recipe.bench, len(self.entries) - 1
        found = compare(before, after, others, bench.bootstrap, bench.seed)
        figures = (
            f"{100 * found.difference:+.1f} points (95 % interval {100 * found.low:+.1f} to "
            f"{100 * found.high:+.1f}, p {found.p_value:.2g} by McNemar, for the best of {others})"
        )
        beyond = {
            "better": "Better than the recipe's own values beyond chance",
            "worse": "Worse than the recipe's own values beyond chance, with a lower NLL",
            "no difference": "No difference from the recipe's own values beyond chance",
        }
        return found, f"{beyond[found.verdict]}: {figures}."


def step_at(share: float, steps: int) -> int:
    """The step of a rung; before the last one, where there is one before it."""
    return max(1, min(math.ceil(share * steps), steps - 1))


def ranked(entries: Sequence[_Entry]) -> list[_Entry]:
    """Best first: by agreement; of those within one prompt of the best that is left, the lowest
    NLL."""
    left, order = list(entries), list[_Entry]()
    while left:
        right = max(entry.last.right for entry in left if entry.last)
        tied = [entry for entry in left if entry.last and entry.last.right >= right - 1]
        order.append(min(tied, key=lambda entry: entry.last.nll if entry.last else math.inf))
        left.remove(order[-1])
    return order


def lines_of(spec: DistillSpec) -> str:
    """The part of a recipe with these values."""
    lines = [
        "distill:",
        f"  learning_rate: {plain(spec.learning_rate)}",
        f"  epochs: {plain(spec.epochs)}",
    ]
    if spec.tuning != "full":
        values = {"rank": spec.lora.rank, "alpha": spec.lora.alpha, "dropout": spec.lora.dropout}
        shown = ", ".join(f"{n}: {plain(v)}" for n, v in values.items() if n != "dropout" or v)
        lines.append(f"  lora: {{{shown}}}")
    return "\n".join(lines)


def plain(value: float) -> str:
    """A number without an exponent, which YAML might read as text."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")


def shown(interval: Any) -> str:
    value, low, high = (100 * each for each in (interval.value, interval.low, interval.high))
    return f"{value:.1f} % (95 % interval {low:.1f} to {high:.1f})"
