"""A realistic sweep and learning curve, for tests of what is drawn of them."""

from __future__ import annotations

from edgedistill.results import Interval
from edgedistill.tuning_results import (
    Comparison,
    CurvePoint,
    Forecast,
    LearningCurve,
    Sweep,
    SweepTrial,
    TrialExam,
)


def sample_sweep() -> Sweep:
    """Four learning rates and the recipe's own; one of them diverged."""
    return Sweep(
        recipe="support-sql",
        method="sft",
        tuning="lora",
        prompts=62,
        rungs=[1 / 3, 0.48, 0.69],
        trials=[
            _trial(4e-4, [(27, 0.65, 0.62), (78, 0.84, 0.31)], own=True),
            _trial(1e-4, [(27, 0.32, 0.95)], 27, "number 4 of 5 behind 33 %"),
            _trial(2e-4, [(27, 0.52, 0.74), (38, 0.6, 0.7)], 38, "number 3 of 3 behind 48 %"),
            _trial(8e-4, [(27, 0.74, 0.5), (38, 0.79, 0.4), (54, 0.87, 0.28), (78, 0.92, 0.22)]),
            _trial(3e-2, [], 27, "diverged: the loss is nan at step 9"),
        ],
        winner=3,
        agreement=Interval(0.92, 0.85, 0.98, 62),
        against_own=Comparison(0.081, 0.02, 0.16, 62, 6, 1, 0.5, 4, "no difference"),
        said="learning rate 0.0008, rank 32, epochs 3: agreement 92.0 % (95 % interval 85.0 to "
        "98.0) on 62 validation prompts, which chose it. No difference from the recipe's own "
        "values beyond chance: +8.1 points (95 % interval +2.0 to +16.0, p 0.5 by McNemar, for "
        "the best of 4).",
        lines="distill:\n  learning_rate: 0.0008\n  epochs: 3\n  lora: {rank: 32, alpha: 64}",
    )


def _trial(
    rate: float,
    exams: list[tuple[int, float, float]],
    stopped_at: int | None = None,
    why: str = "",
    own: bool = False,
) -> SweepTrial:
    made = [TrialExam(*exam) for exam in exams]
    folder = "distill-0123456789abcdef"
    return SweepTrial(rate, 32, 64.0, 3.0, own, 78, folder, made, stopped_at, why, 321.5)


def sample_curve(refused: str = "") -> LearningCurve:
    """Four sizes, two seeds, and a forecast unless it is refused."""
    shares = {52: (0.42, 0.48), 104: (0.6, 0.64), 209: (0.74, 0.76), 418: (0.85, 0.87)}
    ahead = Forecast(
        refused="", form="a + b n^-c", a=0.02, b=11.0, c=0.76, rows=836,
        agreement=Interval(0.91, 0.87, 0.95, 62), gain=0.052, gain_low=0.02, gain_high=0.07,
    )  # fmt: skip
    return LearningCurve(
        recipe="support-sql",
        method="sft",
        prompts=62,
        epochs=3.0,
        seeds=2,
        points=[
            CurvePoint(
                rows=rows,
                steps=3 * -(-rows // 16),
                nll=1 - sum(each) / 3,
                each=list(each),
                agreement=Interval(sum(each) / 2, sum(each) / 2 - 0.08, sum(each) / 2 + 0.07, 62),
                folders=["distill-0123456789abcdef"],
                seconds=100.0 * rows / 52,
            )
            for rows, each in shares.items()
        ],
        forecast=Forecast(refused) if refused else ahead,
        more_calls=512,
        more_tokens=301_000,
        said=f"No forecast: {refused}." if refused else "Twice the training rows would bring 91 %.",
        notes=["Chance is in the intervals."],
    )
