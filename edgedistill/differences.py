"""What one figure of a result is worth beside the same figure of another.

A timing belongs to its device: two are told apart turn by turn where they were measured in many,
and else by Welch's interval over their processes. Answers to the same prompts are compared prompt
by prompt. A file's size is known exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgedistill import paired
from edgedistill.figures import FIGURES, SHARES
from edgedistill.measures import STATISTICS, Measure, t95
from edgedistill.result_file import RATES, Result

FLAGS = {  # figure: its field in the rows of `likeness`
    "agreement": "same", "gold": "gold", "refusals": "refuses", "regressions": "answers",
    "drift": "drifts",
}  # fmt: skip
TURNED = {"better": "worse", "worse": "better"}  # of a share that is better the less it is
ROUNDING = 1e-9  # of the degrees of freedom, whole where both vary alike
BETTER, WORSE, ALIKE, UNTOLD = "better", "worse", "no difference", "cannot be told"


@dataclass(frozen=True)
class Difference:
    """A figure against a baseline's: their `ratio` (of a share: the difference, in shares) with
    its 95 % interval. `verdict` is one of BETTER, WORSE, ALIKE and UNTOLD, for which `why` says
    why; then the other numbers are None."""

    verdict: str
    why: str = ""
    kind: str = "ratio"  # "ratio" | "difference"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None  # of McNemar's exact test, where answers were compared
    in_turn: bool = False  # the ratio is that of turns, and not of the two values


def value_of(result: Result, name: str) -> dict[str, Any] | None:
    """The figure with its interval and unit, or None where the result has none. Of a measured one
    the interval is where another sitting's is expected, of a share it is a bootstrap's over
    prompts; a bound that is not known is None."""
    unit = FIGURES[name].unit
    if name == "bytes":
        size = result.model["bytes"]  # None: a server tells it of no model
        return size and {"value": size, "low": size, "high": size, "unit": unit}
    if name in SHARES:
        share = (result.likeness or {}).get(name)
        return None if share is None else {**share, "unit": unit}
    found = result.figures.get(name)
    if found is None:
        return None
    low, high = _known(found.low), _known(found.high)
    return {"value": found.value, "low": low, "high": high, "unit": unit}


def _known(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def device_of(result: Result) -> tuple[str, str]:
    """What must be equal for two timings to be of the same device: where it is, and its kind."""
    return result.device["address"], result.device["fingerprint"]


def difference(name: str, ours: Result, baseline: Result) -> Difference | None:
    """The figure `name` of `ours` against that of `baseline`; None where one of them lacks it."""
    if value_of(ours, name) is None or value_of(baseline, name) is None:
        return None
    if name in SHARES:
        return _by_prompt(name, ours, baseline)
    if name == "bytes":
        ratio = ours.model["bytes"] / baseline.model["bytes"]
        return Difference(_verdict(name, ratio, ratio), value=ratio, low=ratio, high=ratio)
    if device_of(ours) != device_of(baseline):
        return Difference(UNTOLD, "measured on another device")
    if ours.load["busy"] or baseline.load["busy"]:
        return Difference(UNTOLD, "other work disturbed the machine")
    figures = ours.figures[name], baseline.figures[name]
    one_sitting = ours.sitting is not None and ours.sitting == baseline.sitting
    turns = [len(each.groups) for each in figures]
    if one_sitting and name in RATES and turns[0] == turns[1] >= paired.LEAST_RANKED:
        return replace(_timed(name, *turns_ratio(*figures)), in_turn=True)
    return _timed(name, *ratio_of(*figures, one_sitting=one_sitting))


def turns_ratio(ours: Measure, baseline: Measure) -> tuple[float, float, float]:
    """The ratio of two figures that were measured in turn, with its 95 % interval: by the ranks of
    the logarithms of each turn's ratio, since what moves the machine for longer than a turn moves
    both, and a few disturbed turns do not bend ranks (paired.signed_ranks). All nan where a value
    is 0."""
    turns = list(zip(_each(ours), _each(baseline), strict=True))
    if not all(value > 0 for turn in turns for value in turn):
        return math.nan, math.nan, math.nan
    middle, low, high = paired.signed_ranks([math.log(a / b) for a, b in turns])
    return math.exp(middle), math.exp(low), math.exp(high)


def ratio_of(
    ours: Measure, baseline: Measure, one_sitting: bool = False
) -> tuple[float, float, float]:
    """The ratio of two figures with its 95 % interval: Welch's over the processes' figures, by the
    relative error of each (Welch 1947, Biometrika 34). Unbounded (nan) where one of them was
    measured in one process. A `baseline` of 0 has no ratio: all nan."""
    if baseline.value == 0 or ours.value == 0:
        return math.nan, math.nan, math.nan
    ratio = ours.value / baseline.value
    if min(len(ours.groups), len(baseline.groups)) < 2:
        return ratio, math.nan, math.nan
    error, degrees = relative_error(ours, baseline, one_sitting)
    if error == 0:
        return ratio, ratio, ratio
    half = t95(degrees) * error
    return ratio, ratio * math.exp(-half), ratio * math.exp(half)


def relative_error(
    ours: Measure, baseline: Measure, one_sitting: bool = False
) -> tuple[float, int]:
    """The standard error of the logarithm of two figures' ratio, and its degrees of freedom by
    Welch and Satterthwaite, rounded down. Each was measured in two processes at least, and in a
    sitting of its own, unless it was `one_sitting`: another sitting's mean differs from this one
    as one more process does (measures.measure)."""
    a, b = (_relative_variance(each, one_sitting) for each in (ours, baseline))
    if a + b == 0:
        return 0.0, 1
    shares = ((a, len(ours.groups)), (b, len(baseline.groups)))
    degrees = (a + b) ** 2 / sum(v**2 / (n - 1) for v, n in shares)
    return math.sqrt(a + b), max(1, math.floor(degrees + ROUNDING))


def _relative_variance(figure: Measure, one_sitting: bool) -> float:
    """Of a sitting's mean, as a share of it."""
    each = _each(figure)
    n = len(each)
    share = 1 / n if one_sitting else (1 + 1 / n) / 2  # two of these are one more process
    return statistics.variance(each) * share / figure.value**2


def _each(figure: Measure) -> list[float]:
    """By process."""
    return [STATISTICS[figure.statistic](group) for group in figure.groups]


def _timed(name: str, ratio: float, low: float, high: float) -> Difference:
    if math.isnan(low):
        return Difference(UNTOLD, "it was 0, or measured in one process only")
    return Difference(_verdict(name, low, high), value=ratio, low=low, high=high)


def _verdict(name: str, low: float, high: float) -> str:
    """Of a ratio's interval."""
    if low <= 1 <= high:
        return ALIKE
    return BETTER if (low > 1) is FIGURES[name].more_is_better else WORSE


def _by_prompt(name: str, ours: Result, baseline: Result) -> Difference:
    field = FLAGS[name]
    before, after = flags_of(baseline, field), flags_of(ours, field)
    if not before or not after:
        return Difference(UNTOLD, "a bundle does not hold its answers, prompt by prompt")
    if before.keys() != after.keys():
        return Difference(UNTOLD, "not the same prompts have an answer to compare with")
    order = sorted(before)
    found = paired.compare(_in_order(before, order), _in_order(after, order))
    verdict = found.verdict
    if not FIGURES[name].more_is_better:
        verdict = TURNED.get(verdict, verdict)
    return Difference(
        verdict=verdict,
        kind="difference",
        value=found.difference,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
    )


def flags_of(result: Result, field: str) -> dict[str, bool]:
    """By prompt ID what the check said; without the prompts it could say nothing of."""
    # Of what the teacher refuses `answers` alone is told; earlier files say `refuses` there, too.
    held = "refused" if field == FLAGS["regressions"] else "rows"
    rows = (result.likeness or {}).get(held, [])
    return {row["id"]: row[field] for row in rows if field in row}


def _in_order(flags: dict[str, bool], order: Sequence[str]) -> list[bool]:
    return [flags[prompt] for prompt in order]
