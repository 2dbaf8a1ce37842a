"""What a difference on the same prompts is worth."""

from __future__ import annotations

import random

import pytest

from edgedistill.paired import compare, holm, mcnemar, signed_ranks


def flags(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024)],
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("gained", "lost", "picked_from", "verdict"),
    [
        (10, 1, 1, "better"),
        (1, 10, 1, "worse"),
        (4, 1, 1, "no difference"),
        (6, 0, 1, "better"),
        (6, 0, 2, "no difference"),  # p is .031 for one, .063 for the best of two
        (0, 0, 3, "no difference"),
    ],
)
def test_verdict(gained: int, lost: int, picked_from: int, verdict: str) -> None:
    found = compare(*flags(30, gained, lost, 20), picked_from)
    assert found.verdict == verdict
    assert found.difference == pytest.approx((gained - lost) / found.n)
    assert found.low <= found.difference <= found.high
    assert (found.gained, found.lost, found.n) == (gained, lost, 50 + gained + lost)


def test_the_best_of_many_has_a_wider_interval() -> None:
    one, ten = (compare(*flags(30, 8, 3, 20), count) for count in (1, 10))
    assert ten.low < one.low
    assert ten.high > one.high


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_signed_ranks_of_ten() -> None:
    """Of ten values 8 of 55 means are left out at each end, and one value far away moves neither
    the middle nor the other end."""
    values = [float(i) for i in range(1, 11)]
    middle, low, high = signed_ranks(values)
    means = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert (middle, low, high) == (5.5, means[8], means[46])
    assert signed_ranks([*values[:-1], 1000.0])[:2] == (5.5, low)


@pytest.mark.parametrize(("n", "rank_sum"), [(10, 8), (12, 13), (15, 25), (20, 52), (30, 137)])
def test_rank_sums_are_those_of_the_tables(n: int, rank_sum: int) -> None:
    """Wilcoxon's table, two-sided 5 %."""
    means = sorted((a + b) / 2 for a in range(n) for b in range(a, n))
    assert signed_ranks([float(value) for value in range(n)])[1] == means[rank_sum]


def test_few_values_are_not_ranked() -> None:
    with pytest.raises(ValueError, match="9 values are too few"):
        signed_ranks([1.0] * 9)


@pytest.mark.parametrize("far", [0.0, 0.2])
def test_signed_ranks_hold_the_truth(far: float) -> None:
    """In 95 of 100 cases, whether or not some values are disturbed."""
    draw, held = random.Random(0), 0
    for _ in range(500):
        values = [draw.gauss(0, 5 if draw.random() < far else 1) for _ in range(20)]
        _, low, high = signed_ranks(values)
        held += low <= 0 <= high
    assert 0.93 <= held / 500 <= 0.975
