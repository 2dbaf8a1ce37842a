"""learning-curve: agreement against the number of traces, and what twice as many would buy.

Nested random parts of the training rows are each learnt with the recipe's own values, and examined
on the validation part. Each training is a stage "distill" of its own, reused by a second run; that
of all rows is the one a build makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Dataset,
    Finished,
    Identity,
    dataset_of,
    link_or_copy,
    load_finished,
    run_stage,
    write_atomic,
    write_json,
)
from edgedistill.curate import FEW
from edgedistill.distill.trial import Sat, Trial
from edgedistill.errors import Diverged, UsageError
from edgedistill.fidelity import read_rows, shuffled
from edgedistill.learning import first_run
from edgedistill.methods import DistillSpec
from edgedistill.pipeline import Prepared, prepared
from edgedistill.progress import Progress
from edgedistill.recipe import BenchSpec, Recipe
from edgedistill.recorder import Recorder
from edgedistill.results import Interval
from edgedistill.strict import SEEDS
from edgedistill.tuning import scope_of
from edgedistill.tuning_results import CurvePoint, Forecast, LearningCurve
from edgedistill.workspace import locked

MOST_SIZES, MOST_SEEDS = 16, 16
FOUND, PAGE = "learning-curve.json", "learning-curve.html"


def learning_curve(
    recipe: Recipe, sizes: Sequence[float], seeds: int, root: Path, progress: Progress
) -> Finished:
    """Stage "learning-curve": its facts are a LearningCurve as JSON, its files
    `learning-curve.json` and `learning-curve.html`.

    A seed above 0 draws other rows, and trains with another seed. What the trainings learn from is
    made first where the workspace `root` has it not.

    Raises:
        UsageError: a size that is no share of the rows, or too many sizes or seeds.
        Diverged: one of the trainings came to nothing.
    """
    _require(sizes, seeds)
    with locked(root):
        log = Recorder(progress)
        ready = prepared(recipe, root, log)
        assert ready is not None  # it ends early only when it is told to
        rows = sorted({max(1, round(size * ready.dataset.train)) for size in sizes})
        curve = _Curve(recipe, ready, rows, seeds, root, log)
        trials = {(n, seed): curve.trial(n, seed) for n in rows for seed in range(seeds)}
        identity = Identity(
            stage="learning-curve",
            version=1,
            spec={
                "scope": scope_of("learning-curve", recipe, ready.dataset, ready.student),
                "rows": rows,
                "seeds": seeds,
                "trials": [trial.given.identity.key for trial in trials.values()],
                "recipe": recipe.name,
                "bench": recipe.bench.model_dump(mode="json", include={"bootstrap", "seed"}),
            },
            inputs={
                "dataset": ready.dataset.digest,
                "student": ready.student.digest,
                "traces": ready.traces.digest,
            },
        )
        return run_stage(identity, root, log, lambda folder: curve.draw(trials, folder))


def _require(sizes: Sequence[float], seeds: int) -> None:
    wrong = [size for size in sizes if not 0 < size <= 1]
    if wrong or not 1 <= len(sizes) <= MOST_SIZES:
        told = f"{wrong[0]:g} is none" if wrong else f"there are {len(sizes)}"
        raise UsageError(
            f"--sizes takes up to {MOST_SIZES} shares of the training rows, above 0 and up to 1: "
            f"{told}"
        )
    if not 1 <= seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds is {seeds}, and must be from 1 to {MOST_SEEDS}")


def subset(dataset: Dataset, rows: int, seed: int, out: Path, progress: Progress) -> Dataset:
    """Stage "subset": `rows` of the training rows, the other parts as they are. By the same seed a
    smaller one lies inside a larger one; all rows are the dataset itself."""
    if rows >= dataset.train:
        return dataset
    identity = Identity(
        stage="subset",
        version=1,
        spec={"rows": rows, "seed": seed},
        inputs={"dataset": dataset.digest},
    )

    def work(folder: Path) -> dict[str, Any]:
        every = read_rows(dataset.folder / "train.jsonl")
        drawn = sorted(every, key=lambda row: shuffled(row.id, seed))[:rows]
        kept = {row.id for row in drawn}
        lines = (dataset.folder / "train.jsonl").read_text("utf-8").split("\n")
        chosen = [f"{line}\n" for line, row in zip(lines, every, strict=False) if row.id in kept]
        (folder / "train.jsonl").write_bytes("".join(chosen).encode())
        for name in ("validation", "held_out", "rejected"):
            link_or_copy(dataset.folder / f"{name}.jsonl", folder / f"{name}.jsonl")
        return {"train": rows, "of": dataset.train}

    done = run_stage(identity, out, progress, work)
    return dataset_of(done, rows, dataset)


@dataclass(frozen=True)
class _Curve:
    """The trainings of one learning curve."""

    recipe: Recipe
    ready: Prepared
    rows: Sequence[int]
    seeds: int
    root: Path
    progress: Progress

    def trial(self, rows: int, seed: int) -> Trial:
        part = subset(self.ready.dataset, rows, seed, self.root, self.progress)
        spec = with_seed(self.recipe.distill, seed)
        if spec.proxy is not None and part is not self.ready.dataset:
            # A proxy of few rows may be far from the teacher: that is what the curve shows.
            free = spec.proxy.model_copy(update={"min_agreement": 0})
            spec = spec.model_copy(update={"proxy": free})
        recipe = self.recipe.model_copy(update={"distill": spec})
        traces, student = self.ready.traces, self.ready.student
        given = first_run(recipe, traces, part, student, self.root, self.progress)
        return Trial(given, self.root)

    def draw(self, trials: Mapping[tuple[int, int], Trial], folder: Path) -> dict[str, Any]:
        """The work of the stage."""
        from edgedistill.report.tuning import curve_page

        sat = {at: trial.at_end(self.progress) for at, trial in trials.items()}
        if broken := next((found for found in sat.values() if found.diverged), None):
            raise Diverged(
                f"a part of the rows cannot be learnt: {broken.diverged}",
                hint="lower distill.learning_rate, and run the same command again",
            )
        value = self._found(trials, sat).to_json()
        write_json(folder / FOUND, value)
        write_atomic(folder / PAGE, curve_page(value).encode())
        return value

    def _found(
        self, trials: Mapping[tuple[int, int], Trial], sat: Mapping[tuple[int, int], Sat]
    ) -> LearningCurve:
        import numpy as np

        from edgedistill.forecast import forecast

        prompts = list(next(iter(sat.values())).same)
        right = np.array(
            [
                [[sat[n, seed].same[row] for row in prompts] for seed in range(self.seeds)]
                for n in self.rows
            ]
        )
        now, seed = self.ready.dataset.train, self.recipe.bench.seed
        ahead = forecast(self.rows, right, 2 * now, seed)
        calls, tokens = self._cost(now)
        return LearningCurve(
            recipe=self.recipe.name,
            method=self.recipe.distill.begins_with,
            prompts=len(prompts),
            epochs=self.recipe.distill.epochs,
            seeds=self.seeds,
            points=self._points(trials, sat, right),
            forecast=ahead,
            more_calls=calls,
            more_tokens=tokens,
            said=said(ahead, now, calls, tokens),
            notes=self._notes(ahead, len(prompts)),
        )

    def _points(
        self,
        trials: Mapping[tuple[int, int], Trial],
        sat: Mapping[tuple[int, int], Sat],
        right: Any,
    ) -> list[CurvePoint]:
        points = []
        for place, n in enumerate(self.rows):
            own = [(trials[n, seed], sat[n, seed]) for seed in range(self.seeds)]
            points.append(
                CurvePoint(
                    rows=n,
                    steps=own[0][0].steps,
                    agreement=_share(right[place], self.recipe.bench),
                    nll=sum(found.nll for _, found in own) / len(own),
                    each=[found.agreement for _, found in own],
                    folders=[trial.folder.name for trial, _ in own],
                    seconds=round(sum(map(_seconds, own)), 1),
                )
            )
        return points

    def _cost(self, rows: int) -> tuple[int, int]:
        """Calls of the teacher, and tokens, that as many training rows again would take: of every
        call so far so many became a row that can be used."""
        done, data = load_finished(self.ready.traces.folder, reused=True), self.ready.dataset
        assert done is not None, "the traces are of a complete stage"
        facts, usable = done.facts, data.train + data.validation + data.held_out
        calls = math.ceil(rows * facts["calls"] / usable)
        tokens = facts["prompt_tokens"] + facts["completion_tokens"]
        return calls, round(calls * tokens / facts["calls"])

    def _notes(self, ahead: Forecast, prompts: int) -> list[str]:
        notes = []
        if prompts < FEW:
            notes.append(f"Below {FEW} validation prompts, figures are little more than chance.")
        if self.seeds == 1:
            notes.append(
                "One training for each size: how it varies by chance is not in the intervals."
            )
        if ahead.form and not ahead.a:
            notes.append(
                "The forecast has no floor (a = 0): it is what more traces would buy at the most."
            )
        if self.recipe.distill.method == "on-policy":
            notes.append("It is the curve of the training that on-policy rounds begin with.")
        return notes


def _share(right: Any, spec: BenchSpec) -> Interval:
    """Agreement of one size, from its flags [seeds, prompts]; the interval is over both."""
    import numpy as np

    from edgedistill.bench.agreement import bootstrap
    from edgedistill.forecast import TAILS, resampled

    value = float(right.mean())
    if len(right) == 1 or value in (0.0, 1.0):
        return bootstrap(right[0].tolist(), spec.bootstrap, spec.seed)
    low, high = np.quantile(1 - resampled(right[np.newaxis], spec.seed)[:, 0], TAILS)
    return Interval(value, float(low), float(high), right.shape[1])


def with_seed(spec: DistillSpec, seed: int) -> DistillSpec:
    return spec.model_copy(update={"seed": (spec.seed + seed) % SEEDS})


def _seconds(own: tuple[Trial, Sat]) -> float:
    done = load_finished(own[0].folder, reused=True)
    return own[1].seconds + (float(done.manifest["wall_seconds"]) if done else 0.0)


def said(ahead: Forecast, now: int, calls: int, tokens: int) -> str:
    """The result in one sentence."""
    cost = f"about {calls:,} more calls of the teacher, {tokens:,} tokens"
    if ahead.refused:
        return f"No forecast: {ahead.refused}. As many training rows again would take {cost}."
    assert ahead.agreement is not None
    assert ahead.gain is not None
    assert ahead.gain_low is not None
    assert ahead.gain_high is not None
    share = ahead.agreement
    return (
        f"Twice the training rows ({now:,} to {ahead.rows:,}) would bring agreement to about "
        f"{100 * share.value:.1f} % (95 % interval {100 * share.low:.1f} to "
        f"{100 * share.high:.1f}), {100 * ahead.gain:+.1f} points ({100 * ahead.gain_low:+.1f} to "
        f"{100 * ahead.gain_high:+.1f}), by the curve error = {ahead.form}: {cost}."
    )
