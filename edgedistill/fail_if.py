"""Conditions such as `tg128 < 0.97 * baseline`: read, never evaluated as code.

    condition = figure ("<" | "<=" | ">" | ">=") bound
    bound     = amount | times [("+" | "-") amount]
    times     = "baseline" | number "*" "baseline" | "baseline" "*" number
    amount    = number ["ms" | "s" | "MB" | "%"]

A figure is a name of edgedistill.figures; `inter_token.p95` is `inter_token_p95`. `baseline` is the
same figure of the baseline. A number without a unit is in the figure's own: seconds, bytes, shares
of 1. Refused are bounds that no share is on the other side of: `agreement < baseline - 3` looks
like a gate of three points, and would never close.
"""

from __future__ import annotations

import math
import operator
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgedistill.errors import UsageError, did_you_mean
from edgedistill.figures import COLUMNS, FIGURES

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<sign><=|>=|[<>*+%-]))"
)
COMPARED: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
BASELINE = "baseline"
UNITS: Mapping[str, Mapping[str, float]] = {  # of a figure's unit: those that fit, in that unit
    "s": {"ms": 1e-3, "s": 1.0}, "bytes": {"MB": 1e6}, "share": {"%": 1e-2},
}  # fmt: skip
EVERY_UNIT = tuple(unit for fitting in UNITS.values() for unit in fitting)
EXAMPLE = "as in `tg128 < 0.97 * baseline`"
OF_SHARES = "as in `agreement < baseline - 3 %` or `agreement < 0.9`"


@dataclass(frozen=True)
class Condition:
    """`figure sign bound`; the bound is `factor` times the baseline's figure plus `offset`, or
    `offset` alone where `factor` is None."""

    text: str
    figure: str
    sign: str
    factor: float | None
    offset: float

    @property
    def wants_less(self) -> bool:
        """Whether it holds for small figures."""
        return self.sign in ("<", "<=")

    def bound(self, baseline: float) -> float:
        """What the figure is held against."""
        return self.offset if self.factor is None else self.factor * baseline + self.offset

    def holds(self, value: float, baseline: float) -> bool:
        """For these two figures, whatever their intervals."""
        return COMPARED[self.sign](value, self.bound(baseline))


def _parts_shares(condition: Condition) -> bool:
    """Whether some share is on the side of the bound that is asked for, and the bound itself could
    be one, beside some baseline."""
    if condition.factor is not None:
        return condition.offset < 1 and condition.factor + condition.offset > 0
    return 0 <= condition.offset <= 1 and any(condition.holds(end, 0.0) for end in (0.0, 1.0))


def figures_like(name: str) -> str:
    """A hint: the figure that was meant, or else those of the table."""
    if guess := did_you_mean(name, FIGURES):
        return guess
    listed = f"the figures of the table are {', '.join(COLUMNS)}; docs/compare.md names the others"
    return wrapped(listed)


def wrapped(listed: str) -> str:
    """A hint of many names, in lines that a terminal holds."""
    return textwrap.fill(listed, 90, subsequent_indent="  ")


def read_condition(text: str) -> Condition:
    """Raises:
    UsageError: it is no condition; it says at which character, and which figures there are.
    """
    return _Reader(text).condition()


@dataclass(frozen=True)
class _Token:
    kind: str  # "number" | "name" | "sign" | "end"
    text: str
    at: int  # from 0


class _Reader:
    """Reads one token behind the other."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._split()
        self.place = 0

    def condition(self) -> Condition:
        figure = self._figure()
        sign = self._take("sign", "<, <=, > or >=", tuple(COMPARED))
        start = self._now
        factor, offset = self._bound(FIGURES[figure].unit)
        if factor is None and self._now.text == BASELINE:
            raise self._wrong(self._now, f"a `*` is missing before `{BASELINE}`")
        self._take(
            "end",
            "the end, a unit that fits (ms, s, MB, %), or + or - and a number behind `baseline`",
        )
        found = Condition(self.text, figure, sign.text, factor, offset)
        if factor is not None and factor < 0:
            raise self._wrong(start, f"`{BASELINE}` cannot be taken a negative number of times")
        if FIGURES[figure].unit == "share" and not _parts_shares(found):
            number = next(token for token in reversed(self.tokens) if token.kind == "number")
            what = "a share is between 0 and 1: all are on one side of this bound"
            raise self._wrong(number, what, self._meant(found, float(number.text)))
        return found

    def _meant(self, found: Condition, number: float) -> str:
        """A hint: the share that may be meant by a number in per cent."""
        before = f"{BASELINE} - " if found.factor is None and found.offset < 0 else ""
        percent = self.tokens[-2].text == "%"
        if percent or not 1 <= number < 100:
            return OF_SHARES
        return f"did you mean {before}{number:g} % or {before}{number / 100:g}?"

    def _bound(self, unit: str) -> tuple[float | None, float]:
        sign = -1.0 if self._given("-") else 1.0
        factor = None
        if self._now.kind == "number":
            factor = sign * self._number()
            if not self._given("*"):
                return None, factor * self._scale(unit)
        elif sign < 0:
            self._number()  # which refuses what stands there
        self._take("name", "a number or `baseline`", (BASELINE,))
        if factor is None:
            factor = self._number() if self._given("*") else 1.0
        for text, side in (("+", 1.0), ("-", -1.0)):
            if self._given(text):
                return factor, side * self._number() * self._scale(unit)
        return factor, 0.0

    def _figure(self) -> str:
        token = self._take("name", "a figure")
        name = token.text.replace(".", "_")
        if name not in FIGURES:
            raise self._wrong(token, f"{token.text!r} is no figure", figures_like(name))
        return name

    def _scale(self, unit: str) -> float:
        """Of the unit that stands here, how much it is in the figure's own; 1 where none does."""
        token = self._now
        if token.text not in EVERY_UNIT:
            return 1.0
        if token.text not in UNITS.get(unit, ()):
            raise self._wrong(token, f"this figure is in {unit}, which is not told in {token.text}")
        self.place += 1
        return UNITS[unit][token.text]

    def _number(self) -> float:
        token = self._take("number", "a number")
        if not math.isfinite(value := float(token.text)):
            raise self._wrong(token, f"{token.text} is too large")
        return value

    @property
    def _now(self) -> _Token:
        return self.tokens[self.place]

    def _given(self, sign: str) -> bool:
        found = self._now.kind == "sign" and self._now.text == sign
        self.place += found
        return found

    def _take(self, kind: str, expected: str, texts: tuple[str, ...] = ()) -> _Token:
        token = self._now
        if token.kind != kind or (texts and token.text not in texts):
            shown = repr(token.text) if token.text else "the end"
            raise self._wrong(token, f"{expected} is expected here, not {shown}")
        self.place += 1
        return token

    def _split(self) -> list[_Token]:
        tokens, at, end = [], 0, len(self.text.rstrip())
        while at < end:
            found = TOKEN.match(self.text, at)
            if found is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                odd = _Token("odd", self.text[at], at)
                raise self._wrong(odd, f"{odd.text!r} is not understood")
            kind = str(found.lastgroup)
            tokens.append(_Token(kind, found[kind], found.start(kind)))
            at = found.end()
        return [*tokens, _Token("end", "", end)]

    def _wrong(self, token: _Token, what: str, hint: str = EXAMPLE) -> UsageError:
        return UsageError(
            f"--fail-if: at character {token.at + 1}: {what}\n"
            f"    {self.text}\n    {' ' * token.at}^",
            hint=hint,
        )
