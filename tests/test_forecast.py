"""A forecast where points carry one, and the reason where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgedistill.forecast import fit, forecast, resampled

ROWS = (64, 128, 256, 512)


def students(errors: list[float], prompts: int, seeds: int = 1, chance: int = 0) -> Any:
    """Flags [sizes, seeds, prompts] of students with such errors: what a better one has wrong, a
    worse one mostly has, too."""
    draw = np.random.default_rng(chance)
    hard = draw.random(prompts)
    found = []
    for error in errors:
        own = draw.random((seeds, prompts))
        found.append(np.where(draw.random((seeds, prompts)) < 0.7, hard, own) >= error)
    return np.array(found)


def law(a: float, b: float, c: float, rows: tuple[int, ...] = ROWS) -> list[float]:
    return [a + b * n**-c for n in rows]


@pytest.mark.parametrize(("a", "b", "c"), [(0.05, 3.0, 0.5), (0.0, 2.0, 0.3), (0.2, 9.0, 0.9)])
def test_exact_points_give_their_law_back(a: float, b: float, c: float) -> None:
    found = fit(np.array(ROWS, float), np.array([law(a, b, c)]), floor=True)
    assert float(found.error(1024)[0]) == pytest.approx(a + b * 1024**-c, abs=0.003)


def test_nothing_negative_is_fitted() -> None:
    rising = np.array([[0.2, 0.3, 0.4, 0.5], [0.5, 0.2, 0.05, 0.0]])
    found = fit(np.array(ROWS, float), rising, floor=True)
    assert (found.a >= 0).all()
    assert (found.b >= 0).all()
    assert found.a[0] == pytest.approx(0.35)  # the mean, and no slope


def test_the_interval_holds_the_truth() -> None:
    held, truth = 0, 1 - law(0.05, 3, 0.5, (1024,))[0]
    for chance in range(30):
        found = forecast(ROWS, students(law(0.05, 3, 0.5), 200, chance=chance), 1024)
        assert found.agreement is not None, found.refused
        held += found.agreement.low <= truth <= found.agreement.high
    assert held >= 26  # of 30; 28.5 are expected of a 95 % interval


def test_gain_is_that_of_the_curve() -> None:
    found = forecast(ROWS, students(law(0.05, 3, 0.5), 400, seeds=3), 1024)
    assert (found.form, found.rows) == ("a + b n^-c", 1024)
    assert found.gain is not None
    assert found.gain_low is not None
    assert found.gain_high is not None
    assert found.gain_low <= found.gain <= found.gain_high
    assert found.gain == pytest.approx(3 * 512**-0.5 - 3 * 1024**-0.5, abs=0.02)


def test_three_sizes_have_no_floor() -> None:
    found = forecast(ROWS[1:], students(law(0.0, 8, 0.6, ROWS[1:]), 400), 1024)
    assert (found.form, found.a) == ("b n^-c", 0)


@pytest.mark.parametrize(
    ("rows", "errors", "prompts", "said"),
    [
        (ROWS[2:], [0.4, 0.2], 200, "3 sizes at least, and there are 2"),
        (ROWS, [0.3, 0.3, 0.3, 0.3], 200, "no trend to draw on"),
        (ROWS, [0.2, 0.3, 0.4, 0.5], 200, "no trend to draw on"),
        (ROWS, [0.6, 0.1, 0.6, 0.1], 400, "lie on no power law: at"),
        (ROWS[1:], [0.45, 0.4, 0.34], 200, "points that the whole curve rises"),
    ],
)
def test_refused_in_words(
    rows: tuple[int, ...], errors: list[float], prompts: int, said: str
) -> None:
    found = forecast(rows, students(errors, prompts), 1024)
    assert said in found.refused
    assert (found.agreement, found.rows, found.gain) == (None, None, None)


def test_seeds_are_drawn_anew_for_each_size() -> None:
    right = np.zeros((2, 2, 50), bool)
    right[:, 1] = True  # one seed right everywhere, one nowhere
    errors = resampled(right, seed=0)
    assert set(np.unique(errors.round(6))) == {0.0, 0.5, 1.0}
    assert (errors[:, 0] != errors[:, 1]).any()
