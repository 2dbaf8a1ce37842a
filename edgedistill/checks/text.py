"""Answers that agree by their text: as it is, as a label, as JSON, by a number, by what a pattern
finds, or by the words they share.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any


class ExactChecker:
    """The same characters."""

    description = "Same text, character for character, after white space at both ends is removed."

    def invalid(self, answer: str) -> str | None:
        return None if answer.strip() else "empty"

    def same(self, answer: str, teacher: str) -> bool:
        return self.invalid(teacher) is None and answer.strip() == teacher.strip()


class LabelChecker:
    """One of a few words."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = {_label(label) for label in labels}
        allowed = f" Allowed labels: {', '.join(labels)}." if labels else ""
        self.description = (
            "Same label: case, white space, and punctuation at both ends do not count." + allowed
        )

    def invalid(self, answer: str) -> str | None:
        label = _label(answer)
        if not label:
            return "empty"
        if self._labels and label not in self._labels:
            return f"not one of the labels: {label[:60]!r}"
        return None

    def same(self, answer: str, teacher: str) -> bool:
        return self.invalid(teacher) is None and _label(answer) == _label(teacher)


# Not + - # and the like: C, C++ and C# are three labels.
_AROUND_LABELS = " \t\r\n.,;:!?\"'`*()[]{}"


def _label(text: str) -> str:
    return " ".join(text.strip(_AROUND_LABELS).casefold().split())


class JsonChecker:
    """The same JSON value."""

    description = (
        "Same JSON value: the order of object keys and white space do not count, numbers compare "
        "by value, the order of lists and the case of strings count."
    )

    def invalid(self, answer: str) -> str | None:
        try:
            _parse_json(answer)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        return None

    def same(self, answer: str, teacher: str) -> bool:
        try:
            return bool(_comparable(_parse_json(answer)) == _comparable(_parse_json(teacher)))
        except (ValueError, RecursionError):
            return False


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _comparable(value: Any) -> Any:
    """Marks booleans, which Python takes for the numbers 0 and 1."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return value


_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


class NumberChecker:
    """The last number of a text."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self.description = (
            "Same number: the last one in the text counts, commas between thousands are dropped, "
            f"and a relative difference up to {tolerance:g} is the same."
        )

    def invalid(self, answer: str) -> str | None:
        return "holds no number" if _last_number(answer) is None else None

    def same(self, answer: str, teacher: str) -> bool:
        ours, theirs = _last_number(answer), _last_number(teacher)
        if ours is None or theirs is None:
            return False
        return math.isclose(ours, theirs, rel_tol=self._tolerance, abs_tol=0.0)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None


class RegexChecker:
    """What a pattern finds last."""

    def __init__(self, pattern: str, ignore_case: bool) -> None:
        self._pattern = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        self._fold = str.casefold if ignore_case else str
        case = ", and case does not count" if ignore_case else ""
        self.description = (
            f"Same text where the pattern {pattern} is found last: its first group, or all of it; "
            f"white space counts once{case}."
        )

    def invalid(self, answer: str) -> str | None:
        return "the pattern is not found" if self._found(answer) is None else None

    def same(self, answer: str, teacher: str) -> bool:
        ours, theirs = self._found(answer), self._found(teacher)
        return ours is not None and ours == theirs

    def _found(self, text: str) -> str | None:
        last = None
        for last in self._pattern.finditer(text):  # noqa: B007
            pass
        if last is None:
            return None
        whole = last[1] if last.re.groups else last[0]
        return None if whole is None else " ".join(self._fold(whole).split())


_WORD = re.compile(r"\w+")


class RougeChecker:
    """Enough of the same words in the same order."""

    def __init__(self, min_f1: float) -> None:
        self._min_f1 = min_f1
        self.description = (
            "Enough of the same words in the same order: F1 of the longest common subsequence of "
            f"words (ROUGE-L) of at least {min_f1:g}; case and punctuation do not count, endings "
            "of words do."
        )

    def invalid(self, answer: str) -> str | None:
        return None if _WORD.search(answer) else "has no word"

    def same(self, answer: str, teacher: str) -> bool:
        return rouge_l(answer, teacher) >= self._min_f1


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1 (Lin 2004, ROUGE-L with beta 1)."""
    ours, theirs = (_WORD.findall(text.casefold()) for text in (answer, reference))
    common = _common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence, in memory of one row of the table."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
