"""What more traces would buy, from what fewer of them gave.

A learning curve's error falls as a power law towards a floor: error(n) = a + b n^-c (Hestness et
al. 2017, arXiv 1712.00409). A few points on few prompts carry that only sometimes; where they do
not, there is no forecast, and a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.results import Interval
from edgedistill.tuning_results import Forecast

FEWEST, WITH_FLOOR = 3, 4  # sizes
POWERS = np.linspace(0.05, 2, 79)  # c: what is published lies between 0.07 and 0.5
STRAY = 3.0  # standard errors between a point and the curve
RESAMPLES = 2000
TAILS = (0.025, 0.975)
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Curve:
    """error(n) = a + b n^-c of r resamples: arrays [r]."""

    a: Floats
    b: Floats
    c: Floats

    def error(self, rows: float) -> Floats:
        return self.a + self.b * rows**-self.c


def forecast(rows: Sequence[int], right: Flags, at: int, seed: int = 0) -> Forecast:
    """Agreement at `at` rows, and what was gained since half of them.

    `right` [sizes, seeds, prompts] says where students that learnt from `rows` [sizes], smallest
    first, agreed with the teacher.

    The interval is a bootstrap's over prompts, and over seeds where there are several. It is of
    the curve: one training more or less lucky lies outside it.
    """
    if len(rows) < FEWEST:
        return Forecast(
            f"a forecast needs trainings of {FEWEST} sizes at least, and there are {len(rows)}"
        )
    errors = resampled(right, seed)
    n, floor = np.array(rows, float), len(rows) >= WITH_FLOOR
    measured = 1 - right.mean((1, 2))[np.newaxis]
    curve, drawn = fit(n, measured, floor), fit(n, errors, floor)
    value, spread = 1 - float(curve.error(at)[0]), 1 - drawn.error(at)
    low, high = np.quantile(spread, TAILS)
    if refused := _refusal(rows, right.shape[2], measured[0], errors, curve, float(high - low)):
        return Forecast(refused)
    gains = drawn.error(at / 2) - drawn.error(at)
    gain_low, gain_high = np.quantile(gains, TAILS)
    return Forecast(
        refused="",
        form="a + b n^-c" if floor else "b n^-c",
        a=float(curve.a[0]),
        b=float(curve.b[0]),
        c=float(curve.c[0]),
        rows=at,
        agreement=Interval(value, float(low), float(high), right.shape[2]),
        gain=float((curve.error(at / 2) - curve.error(at))[0]),
        gain_low=float(gain_low),
        gain_high=float(gain_high),
    )


def resampled(right: Flags, seed: int) -> Floats:
    """Errors [RESAMPLES, sizes] on prompts drawn with replacement, the same for every size, and
    for each size of seeds drawn with replacement."""
    chance, (sizes, seeds, prompts) = np.random.default_rng(seed), right.shape
    counts = chance.multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES)
    shares = (~right).astype(float) @ (counts.T / prompts)  # [sizes, seeds, resamples]
    drawn = chance.integers(seeds, size=(sizes, seeds, RESAMPLES))
    found: Floats = np.take_along_axis(shares, drawn, 1).mean(1).T
    return found


def fit(rows: Floats, errors: Floats, floor: bool) -> Curve:
    """The curve that lies nearest, by least squares, to each of errors [r, sizes]; a, b >= 0, and
    without `floor` a = 0."""
    count, best = len(errors), np.full(len(errors), np.inf)
    a, b, c = np.zeros(count), np.zeros(count), np.zeros(count)
    for power in POWERS:
        x = (rows / rows[-1]) ** -power
        for each_a, each_b in _lines(x, errors, floor):
            apart = ((each_a[:, None] + each_b[:, None] * x - errors) ** 2).sum(1)
            better = (apart < best) & (each_a >= 0) & (each_b >= 0)
            best = np.where(better, apart, best)
            a, b = np.where(better, each_a, a), np.where(better, each_b * rows[-1] ** power, b)
            c = np.where(better, power, c)
    return Curve(a, b, c)


def _lines(x: Floats, errors: Floats, floor: bool) -> list[tuple[Floats, Floats]]:
    """Lines a + b x that may be the nearest with a, b >= 0: free, with a = 0, with b = 0."""
    through = errors @ x / (x @ x)
    found = [(np.zeros_like(through), through)]
    if floor:
        mean, off = errors.mean(1), x - x.mean()
        slope = errors @ off / (off @ off)
        found += [(mean - slope * x.mean(), slope), (mean, np.zeros_like(mean))]
    return found


def _refusal(
    rows: Sequence[int], prompts: int, measured: Floats, errors: Floats, curve: Curve, width: float
) -> str:
    """Why these points carry no forecast, in words; else ""."""
    rise = errors[:, 0] - errors[:, -1]
    mean, (low, high) = measured[0] - measured[-1], np.quantile(rise, TAILS)
    if low <= 0:
        return (
            f"from {rows[0]} to {rows[-1]} training rows agreement changes by "
            f"{_points(mean)} (95 % interval {_points(low)} to {_points(high)}): no more than "
            f"chance on {prompts} validation prompts, so there is no trend to draw on"
        )
    least = 0.5 / prompts  # what rounding to whole prompts does
    for size, error, spread in zip(rows, measured, errors.std(0), strict=True):
        expected = float(curve.error(size)[0])
        if abs(error - expected) > STRAY * max(float(spread), least):
            return (
                f"the points lie on no power law: at {size} rows it has {100 * (1 - expected):.1f} "
                f"% agreement, and {100 * (1 - error):.1f} % was measured"
            )
    if width > mean:
        return (
            f"its 95 % interval would be {100 * width:.1f} points wide, more than the "
            f"{100 * mean:.1f} points that the whole curve rises: {prompts} validation prompts and "
            "these sizes do not carry it"
        )
    return ""


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"
