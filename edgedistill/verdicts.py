"""What verdicts of a judge come to: wins, grades, how far its place bends it, and how often it is
right where that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import paired
from edgedistill.bench.agreement import bootstrap
from edgedistill.judging import FIRST, SECOND, TIE, of_orders, turned
from edgedistill.paired import mcnemar

RESAMPLES = 2000
TAIL = 0.025
RIGHT_FROM = 6  # the grade from which the rubric calls an answer right in the main


@dataclass(frozen=True)
class PairVerdict:
    """One pair of answers. `shown_first` and `shown_second` are the verdicts with the pair's first
    answer in the first place and in the second, each by place (FIRST, SECOND, TIE; None: not to be
    read). `gold` is the verdict that the references give, where they are known. `asked` False: the
    answers are equal, and a tie without a judge."""

    id: str
    shown_first: str | None
    shown_second: str | None
    gold: str | None = None
    asked: bool = True

    @property
    def verdict(self) -> str | None:
        """Which answer of the pair wins; None where one of the two verdicts cannot be read."""
        return of_orders(self.shown_first, self.shown_second)

    @property
    def flips(self) -> bool:
        """Whether the order changes it."""
        return self.shown_second is not None and self.shown_first != turned(self.shown_second)


def of_pairs(pairs: Sequence[PairVerdict], seed: int = 0) -> dict[str, Any]:
    """Win, tie and loss of the first answers, with the sign test over the pairs that are decided;
    position bias; and agreement with gold (None without any). Each share has its bootstrap interval
    over pairs."""
    read = [pair for pair in pairs if pair.verdict is not None]
    counts = {name: sum(p.verdict == name for p in read) for name in (FIRST, TIE, SECOND)}
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "unreadable": len(pairs) - len(read),
        "win": counts[FIRST],
        "tie": counts[TIE],
        "loss": counts[SECOND],
        "p_value": mcnemar(counts[FIRST], counts[SECOND]),
        "difference": None,
        "equal": sum(not pair.asked for pair in pairs),
        "position": _position([pair for pair in read if pair.asked], seed),
        "gold": against_gold(pairs, seed),
    }
    if read:
        lost, won = ([p.verdict == side for p in read] for side in (SECOND, FIRST))
        told = paired.compare(lost, won, seed=seed)
        found["difference"] = {"value": told.difference, "low": told.low, "high": told.high}
    return found


def _position(read: Sequence[PairVerdict], seed: int) -> dict[str, Any] | None:
    """`flips`: the share of pairs whose verdict the order changes. `to_first`: of single verdicts
    that are no tie, the share that names what is shown first; each pair is shown both ways, so that
    a fair judge gives half. Its interval draws pairs, since the two verdicts of one hang together.
    """
    if not read:
        return None
    flips = asdict(bootstrap([pair.flips for pair in read], RESAMPLES, seed))
    places = [(p.shown_first, p.shown_second) for p in read]
    named = np.array([sum(v == FIRST for v in each) for each in places], float)
    decided = np.array([sum(v != TIE for v in each) for each in places], float)
    if not decided.sum():
        return {"flips": flips, "to_first": None}
    low, high = _drawn(
        len(read), seed, lambda at: float(named[at].sum() / max(1.0, decided[at].sum()))
    )
    share = {"value": float(named.sum() / decided.sum()), "low": low, "high": high}
    return {"flips": flips, "to_first": {**share, "n": int(decided.sum())}}


def against_gold(pairs: Sequence[PairVerdict], seed: int = 0) -> dict[str, Any] | None:
    """How often the judge is right. `accuracy`: of the pairs of which gold calls one answer right
    and the other wrong, the share in which it names the right one; a tie, and a verdict that cannot
    be read, is not right. `single`: the same for each order by itself, its interval by drawing
    pairs, since the two verdicts of one hang together. `kappa`: of win, tie and loss, over all
    pairs that have gold and were read."""
    known = [pair for pair in pairs if pair.gold is not None]
    told = [pair for pair in known if pair.gold != TIE]
    if not known:
        return None
    right = [pair.verdict == pair.gold for pair in told]
    read = [(p.verdict, p.gold) for p in known if p.verdict is not None]
    return {
        "pairs": len(told),
        "accuracy": asdict(bootstrap(right, RESAMPLES, seed)) if told else None,
        "single": _single(told, seed) if told else None,
        "ties": sum(pair.verdict == TIE for pair in told),
        "kappa": kappa([str(a) for a, _ in read], [str(b) for _, b in read], seed),
    }


def _single(told: Sequence[PairVerdict], seed: int) -> dict[str, Any]:
    right = np.array(
        [
            (p.shown_first == p.gold)
            + (p.shown_second is not None and turned(p.shown_second) == p.gold)
            for p in told
        ],
        float,
    )
    low, high = _drawn(len(told), seed, lambda at: float(right[at].mean() / 2))
    return {"value": float(right.mean() / 2), "low": low, "high": high, "n": 2 * len(told)}


def of_grades(
    grades: Sequence[int | None], gold: Sequence[bool | None], seed: int = 0
) -> dict[str, Any]:
    """The mean of grades with its bootstrap interval over answers; and, where gold is known, how
    often a grade of RIGHT_FROM or more goes with a right answer (accuracy, kappa)."""
    read = np.array([grade for grade in grades if grade is not None], float)
    found: dict[str, Any] = {
        "answers": len(grades),
        "unreadable": len(grades) - len(read),
        "mean": None,
        "gold": None,
    }
    if len(read):
        low, high = _drawn(len(read), seed, lambda at: float(read[at].mean()))
        found["mean"] = {"value": float(read.mean()), "low": low, "high": high, "n": len(read)}
    known = [
        (grade >= RIGHT_FROM, flag)
        for grade, flag in zip(grades, gold, strict=True)
        if grade is not None and flag is not None
    ]
    if known:
        right = [said == flag for said, flag in known]
        said, flags = ([str(each[i]) for each in known] for i in (0, 1))
        found["gold"] = {
            "accuracy": asdict(bootstrap(right, RESAMPLES, seed)),
            "kappa": kappa(said, flags, seed),
        }
    return found


def kappa(
    ours: Sequence[str], theirs: Sequence[str], seed: int = 0, together: int = 1
) -> dict[str, Any] | None:
    """Cohen's kappa (1960): agreement beyond what chance gives, 1 for all and 0 for none beyond it,
    with its bootstrap interval over the rated, of which so many in a row that hang `together` are
    drawn as one. None where chance alone gives all."""
    if not ours:
        return None
    names = sorted({*ours, *theirs})
    a, b = (np.array([names.index(each) for each in side]) for side in (ours, theirs))
    value = _kappa(a, b, len(names))
    if value is None:
        return None
    count = len(a) // together
    first = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count)) * together
    drawn = (first[:, :, None] + np.arange(together)).reshape(RESAMPLES, -1)
    each = [found for at in drawn if (found := _kappa(a[at], b[at], len(names))) is not None]
    low, high = np.quantile(each, [TAIL, 1 - TAIL])
    return {"value": value, "low": float(low), "high": float(high), "n": len(a)}


def _kappa(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], kinds: int) -> float | None:
    shares = [np.bincount(side, minlength=kinds) / len(side) for side in (a, b)]
    chance = float(shares[0] @ shares[1])
    return None if chance == 1 else (float((a == b).mean()) - chance) / (1 - chance)


def _drawn(
    count: int, seed: int, figure: Callable[[npt.NDArray[np.int64]], float]
) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of a figure of `count` things drawn again."""
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile([figure(at) for at in drawn], [TAIL, 1 - TAIL])
    return float(low), float(high)
