"""Figures with their intervals."""

from __future__ import annotations

import math
import random

import pytest

from edgedistill.measures import measure, outliers, percentile, t95


def test_a_figure_is_the_mean_over_groups() -> None:
    found = measure([[1, 2, 9], [3, 4, 5]], "s", "p50")
    assert (found.value, found.unit, found.statistic) == (3.0, "s", "p50")
    half = 12.706 * math.sqrt(2) * math.sqrt(1 + 1 / 2)
    assert (found.low, found.high) == pytest.approx((0, 3 + half))  # no time is below 0
    assert measure([[-1, 2, 9], [3, 4, 5]], "K", "p50").low == pytest.approx(3 - half)


def test_one_group_says_nothing_about_others() -> None:
    assert math.isnan(measure([[1, 2]], "s").low)
    assert measure([[2, 2]], "s").high == 2
    assert math.isnan(measure([[2]], "s").high)


@pytest.mark.parametrize("groups", [[], [[1], []]])
def test_no_value_no_figure(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="needs a value in each group"):
        measure(groups, "s")


def test_percentiles_lie_between_ranks() -> None:
    found = [percentile([4, 1, 3, 2], share) for share in (0, 0.5, 0.95, 1)]
    assert found == pytest.approx([1, 2.5, 3.85, 4])


def test_what_stands_out_is_named_and_counts() -> None:
    groups = [[10, 11, 9, 10], [10, 90, 11, 9]]
    assert outliers(groups) == measure(groups, "s").outliers == [(1, 1)]
    assert measure(groups, "s").value == 20
    assert outliers([[5, 5, 5, 6]]) == []


@pytest.mark.parametrize("processes", [3, 5, 10])
def test_intervals_hold_another_sitting(processes: int) -> None:
    """Processes differ by 5 %, values within one by 1 %, and sittings by 3 % beside."""
    chance, held = random.Random(0), 0

    def sitting() -> list[list[float]]:
        hour = chance.gauss(100, 3)
        levels = [chance.gauss(hour, 5) for _ in range(processes)]
        return [[chance.gauss(level, 1) for _ in range(5)] for level in levels]

    for _ in range(1000):
        one, two = measure(sitting(), "s"), measure(sitting(), "s")
        held += one.low <= two.value <= one.high
    assert 0.94 < held / 1000 < 0.995


def test_t_falls_to_the_normal_distribution() -> None:
    assert [t95(1), t95(4), t95(29)] == [12.706, 2.776, 2.045]
    behind = {30: 2.0423, 60: 2.0003, 120: 1.9799, 10**6: 1.95997}  # of published tables
    assert {n: t95(n) for n in behind} == pytest.approx(behind, abs=2e-4)
