"""The shape of `sweep.json` and `learning-curve.json`, also in the `report.json` of a build that
has one. All is measured on validation prompts; shares are 0..1, NLL in nats a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgedistill.results import Interval

TUNED = {"sweep": "sweep", "learning-curve": "learning_curve"}  # stage: its field in report.json


def tuned(chain: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of report.json that stages of TUNED give, from the manifests of a build's stages:
    such a stage's facts are all that it found."""
    return {name: chain[stage]["facts"] for stage, name in TUNED.items() if stage in chain}


@dataclass(frozen=True)
class Comparison:
    """Two models on the same n prompts: the difference of their agreements with its 95 % interval,
    the prompts that only the later one has right (`gained`) and only the earlier one (`lost`), and
    McNemar's p value. Interval and p value allow for the best having been `picked_from` so many
    others."""

    difference: float
    low: float
    high: float
    n: int
    gained: int
    lost: int
    p_value: float
    picked_from: int
    verdict: str  # "better" | "worse" | "no difference"


@dataclass(frozen=True)
class TrialExam:
    """A trial's agreement, and the NLL of the teacher's answers, after `step` steps; at the end, of
    the adapter that is kept."""

    step: int
    agreement: float
    nll: float


@dataclass(frozen=True)
class SweepTrial:
    """One combination of values. `rank` and `alpha` are None where every weight is trained."""

    learning_rate: float
    rank: int | None
    alpha: float | None
    epochs: float
    own: bool  # the recipe's own values
    steps: int  # of the whole run
    folder: str  # of its stage "distill", in the workspace
    exams: list[TrialExam]
    stopped_at: int | None  # the step behind which it was left; None: it ran to its end
    why: str  # why it was left; "" where it ran to its end
    seconds: float  # of training and exams, those of earlier commands included


@dataclass(frozen=True)
class Sweep:
    """A grid of trials, of which the worse half was left at each rung."""

    recipe: str
    method: str
    tuning: str
    prompts: int  # of the validation part
    rungs: list[float]  # shares of a trial's steps
    trials: list[SweepTrial]
    winner: int  # its place in `trials`
    agreement: Interval  # the winner's
    against_own: Comparison | None  # None: the winner has the recipe's own values
    said: str  # the result in one sentence
    lines: str  # of YAML, for the recipe

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CurvePoint:
    """Trainings on so many rows: one for each seed."""

    rows: int
    steps: int
    agreement: Interval  # mean over seeds; over prompts and, where there are several, seeds
    nll: float
    each: list[float]  # agreement, by seed
    folders: list[str]
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """Agreement with `rows` training rows by error = a + b n^-c (Hestness et al. 2017, arXiv
    1712.00409), with the 95 % interval over prompts (and seeds); `refused` says why there is none,
    and then all else is None."""

    refused: str
    form: str = ""  # "a + b n^-c" | "b n^-c"
    a: float | None = None
    b: float | None = None
    c: float | None = None
    rows: int | None = None
    agreement: Interval | None = None
    gain: float | None = None  # from the whole of the present rows on, by the same curve
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True)
class LearningCurve:
    """Agreement against the number of traces that the student learns from."""

    recipe: str
    method: str
    prompts: int  # of the validation part
    epochs: float  # the same for each size
    seeds: int
    points: list[CurvePoint]
    forecast: Forecast
    more_calls: int  # of the teacher, for as many training rows again
    more_tokens: int  # prompt and answer, as its present calls had
    said: str  # the result in one sentence
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
