"""Conditions such as `tg128 < 0.97 * baseline`: read, never evaluated as code.

    condition = figure ("<" | "<=" | ">" | ">=") bound
    bound     = number | times [("+" | "-") number]
    times     = "baseline" | number "*" "baseline" | "baseline" "*" number

A figure is a name of edgedistill.figures; `inter_token.p95` is `inter_token_p95`. `baseline` is the
same figure of the baseline.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgedistill.errors import UsageError, did_you_mean
from edgedistill.figures import FIGURES

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<sign><=|>=|[<>*+-]))"
)
COMPARED: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
BASELINE = "baseline"


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
        factor, offset = self._bound()
        self._take("end", "the end, or + or - and a number behind `baseline`")
        return Condition(self.text, figure, sign.text, factor, offset)

    def _bound(self) -> tuple[float | None, float]:
        sign = -1.0 if self._given("-") else 1.0
        factor = None
        if self._now.kind == "number":
            factor = sign * self._number()
            if not self._given("*"):
                return None, factor
        elif sign < 0:
            self._number()  # which refuses what stands there
        self._take("name", "a number or `baseline`", (BASELINE,))
        if factor is None:
            factor = self._number() if self._given("*") else 1.0
        for text, side in (("+", 1.0), ("-", -1.0)):
            if self._given(text):
                return factor, side * self._number()
        return factor, 0.0

    def _figure(self) -> str:
        token = self._take("name", "a figure")
        name = token.text.replace(".", "_")
        if name not in FIGURES:
            guess = did_you_mean(name, FIGURES)
            raise self._wrong(token, f"{token.text!r} is no figure{f'; {guess}' * bool(guess)}")
        return name

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

    def _wrong(self, token: _Token, what: str) -> UsageError:
        return UsageError(
            f"--fail-if: at character {token.at + 1}: {what}\n"
            f"    {self.text}\n    {' ' * token.at}^",
            hint=f"as in `tg128 < 0.97 * baseline`; the figures are {', '.join(FIGURES)}",
        )
