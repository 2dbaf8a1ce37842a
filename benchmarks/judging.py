"""Whether hot paths became slower: the rule of benchmarks/run.py.

Two processes differ by more than two rounds of one, so a figure's noise is taken over processes
(edgedistill.measures). Of many benchmarks one is always the slowest by chance, so the level of the
test is shared among them (Holm 1979, Scandinavian Journal of Statistics 6(2)); and what is told
apart but small is no regression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgedistill.differences import ratio_of, relative_error
from edgedistill.measures import Measure
from edgedistill.paired import holm

LEVEL = 0.05  # of a run with all its benchmarks: how often equal code is called slower or faster
LEAST_EFFECT = 0.10  # of the time
SLOWER, FASTER, ALIKE, UNTOLD = "slower", "faster", "alike", "cannot be told"


@dataclass(frozen=True)
class Judged:
    """One benchmark: seconds now over seconds before, with the 95 % interval of this one alone.
    `p_value` is shared among all benchmarks of the run."""

    name: str
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    why: str = ""


def judge(
    now: Mapping[str, Measure],
    before: Mapping[str, Measure],
    least_effect: float = LEAST_EFFECT,
    one_run: bool = False,
) -> list[Judged]:
    """Each benchmark of `now` against that of `before`, in the order of `now`. `one_run`: both were
    measured in turn, and no other hour is between them."""
    tested = {
        name: p_value(each, before[name], one_run)
        for name, each in now.items()
        if name in before and _tellable(each) and _tellable(before[name])
    }
    shared = dict(zip(tested, holm(list(tested.values())), strict=True))
    found = []
    for name, each in now.items():
        if name not in before:
            found.append(Judged(name, UNTOLD, why="the other side has no such benchmark"))
        elif name not in shared:
            found.append(Judged(name, UNTOLD, why="it was measured in fewer than two processes"))
        else:
            ratio = ratio_of(each, before[name], one_run)
            found.append(_judged(name, ratio, shared[name], least_effect))
    return found


def _judged(
    name: str, found: tuple[float, float, float], shared: float, least_effect: float
) -> Judged:
    ratio, low, high = found
    verdict = ALIKE
    if shared < LEVEL and ratio >= 1 + least_effect:
        verdict = SLOWER
    elif shared < LEVEL and ratio <= 1 / (1 + least_effect):
        verdict = FASTER
    return Judged(name, verdict, ratio, low, high, shared)


def _tellable(figure: Measure) -> bool:
    return len(figure.groups) > 1 and figure.value > 0


def p_value(now: Measure, before: Measure, one_run: bool = False) -> float:
    """Of Welch's test that both take the same time."""
    error, degrees = relative_error(now, before, one_run)
    apart = abs(math.log(now.value / before.value))
    if error == 0:
        return 1.0 if apart == 0 else 0.0
    return two_sided(apart / error, degrees)


def two_sided(t: float, degrees: int) -> float:
    """P(|T| > t) of Student's t of whole degrees (Abramowitz and Stegun 26.7.3 and 4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for n in range(2 + odd, degrees + 1, 2):  # one term for each
        total += term
        term *= (n - 1) / n * cosine**2
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return min(1.0, max(0.0, 1 - within))
