"""What a difference on the same prompts is worth."""

from __future__ import annotations

import pytest

from edgedistill.paired import compare, holm, mcnemar


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
