"""One figure, measured again and again: its value, an interval, and which values stand out.

What is measured within one process is alike (the same pages, the same placement, the same minute),
and another process differs by more than those tell. So values come in groups, one for each process
(of a server: each pass), and the interval is made of the groups' own figures, not of all values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045,
)  # fmt: skip
NORMAL95 = 1.959964
FAR = 3.5  # modified z-score from which a value stands out (Iglewicz and Hoaglin 1993)
MAD_TO_SIGMA = 0.6745


@dataclass(frozen=True)
class Measure:
    """`value` is the mean over groups of each group's `statistic`; `low` to `high` is where 95 % of
    other sittings' values are expected. `groups` holds the values as they came, `outliers` the
    (group, place) of those that stand out; they count all the same."""

    unit: str
    statistic: str  # one of STATISTICS
    value: float
    low: float
    high: float
    groups: list[list[float]]
    outliers: list[tuple[int, int]]

    @property
    def share(self) -> float:
        """Half the interval's width as a share of the value; 0 for a value of 0."""
        return (self.high - self.low) / 2 / self.value if self.value else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the closest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "p50": lambda values: percentile(values, 0.5),
    "p95": lambda values: percentile(values, 0.95),
    "p99": lambda values: percentile(values, 0.99),
}


def measure(groups: Sequence[Sequence[float]], unit: str, statistic: str = "mean") -> Measure:
    """The figure of values in groups. Of a single group nothing is known about others, so its
    interval is the value itself only where its several values are equal, and else unknown (nan).

    The interval is for the value of another sitting: that of one more group (the prediction
    interval, s * sqrt(1 + 1/n)). Its mean would vary less if nothing but groups varied; but a
    sitting is in another hour, and ten of three processes were measured to differ by about as much
    as that (docs/bench.md). It is right where sittings differ, beside their processes, with a
    standard deviation of s * sqrt((1 - 1/n) / 2).

    Raises:
        ValueError: there is no value, or an empty group.
    """
    held = [list(map(float, group)) for group in groups]
    if not held or not all(held):
        raise ValueError("a figure needs a value in each group")
    each = [STATISTICS[statistic](group) for group in held]
    value, n = statistics.fmean(each), len(each)
    if n > 1:
        half = t95(n - 1) * statistics.stdev(each) * math.sqrt(1 + 1 / n)
    else:
        half = 0.0 if len(held[0]) > 1 and len(set(held[0])) == 1 else math.nan
    least = 0.0 if min(map(min, held)) >= 0 else -math.inf  # no time and no rate is below 0
    low = value - half if math.isnan(half) else max(least, value - half)
    return Measure(unit, statistic, value, low, value + half, held, outliers(held))


def t95(degrees: int) -> float:
    """Student's t for a two-sided interval of 95 %; beyond the table by the first terms of its
    expansion around the normal quantile (Abramowitz and Stegun 1964, 26.7.5), to 2e-4."""
    if degrees <= len(T95):
        return T95[degrees - 1]
    z = NORMAL95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def outliers(groups: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Where values are far from the median of all, by their median absolute deviation."""
    every = [value for group in groups for value in group]
    middle = statistics.median(every)
    deviation = statistics.median(abs(value - middle) for value in every)
    if deviation == 0:
        return []
    bound = FAR * deviation / MAD_TO_SIGMA
    return [
        (at, place)
        for at, group in enumerate(groups)
        for place, value in enumerate(group)
        if abs(value - middle) > bound
    ]
