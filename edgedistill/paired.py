"""What differences of pairs are worth: verdicts on the same prompts, rates of the same turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgedistill.measures import NORMAL95
from edgedistill.tuning_results import Comparison

LEVEL = 0.05  # of the test, and outside the interval
LEAST_RANKED = 10  # values; of fewer an interval of ranks is wider than Student's
COUNTED = 50  # values whose rank sums are counted


def compare(
    before: Sequence[bool],
    after: Sequence[bool],
    picked_from: int = 1,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """`after` against `before`, which say for each of n prompts whether the answer was right.

    McNemar's exact test: of the prompts on which only one is right, each falls to either side with
    probability 1/2 where there is no difference. The interval of the difference is a bootstrap's
    over prompts. Where `after` is the best of `picked_from` others, both are Bonferroni's: the best
    of many looks better than it is.
    """
    import numpy as np

    gained = sum(late and not early for early, late in zip(before, after, strict=True))
    lost = sum(early and not late for early, late in zip(before, after, strict=True))
    n, tail = len(before), LEVEL / 2 / picked_from
    shares = [gained / n, lost / n, 1 - (gained + lost) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [tail, 1 - tail])
    p_value = min(1.0, picked_from * mcnemar(gained, lost))
    verdict = "no difference"
    if p_value < LEVEL:
        verdict = "better" if gained > lost else "worse"
    return Comparison(
        difference=(gained - lost) / n,
        low=float(low),
        high=float(high),
        n=n,
        gained=gained,
        lost=lost,
        p_value=p_value,
        picked_from=picked_from,
        verdict=verdict,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p value of the exact test (McNemar 1947, Psychometrika 12(2))."""
    n = gained + lost
    tail: float = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for so many tests (Holm 1979, Scand. J. Stat. 6(2)), in the same order."""
    order, least, found = sorted(range(len(p_values)), key=lambda i: p_values[i]), 0.0, {}
    for rank, at in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        found[at] = least
    return [found[at] for at in range(len(p_values))]


def signed_ranks(values: Sequence[float]) -> tuple[float, float, float]:
    """The middle of `values` (ten at least) and its 95 % interval, by the means of all pairs of
    them: Hodges and Lehmann's estimate with the interval of Wilcoxon's signed-rank test (Hodges and
    Lehmann 1963, Ann. Math. Stat. 34(2)).

    Raises:
        ValueError: there are fewer.
    """
    n = len(values)
    if n < LEAST_RANKED:
        raise ValueError(f"{n} values are too few to rank")
    means = sorted((values[i] + values[j]) / 2 for i in range(n) for j in range(i, n))
    below = _left_out(n)
    middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
    return middle, means[below], means[len(means) - 1 - below]


def _left_out(n: int) -> int:
    """The largest rank sum of n values that has a chance of at most LEVEL / 2 to be undercut or
    reached: exactly, or of many by the normal distribution."""
    if n > COUNTED:
        spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return math.floor(n * (n + 1) / 4 - 0.5 - NORMAL95 * spread)
    ways = [1]  # by rank sum: so many of the 2^n choices of signs give it
    for rank in range(1, n + 1):
        without, with_it = [*ways, *[0] * rank], [*[0] * rank, *ways]
        ways = [a + b for a, b in zip(without, with_it, strict=True)]
    reached, total = 0, 0
    while (total + ways[reached]) * 2 <= LEVEL * 2**n:
        total += ways[reached]
        reached += 1
    return reached - 1
