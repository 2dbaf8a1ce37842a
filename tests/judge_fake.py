"""A judge behind the fake teacher's server: it reads what it is shown, and decides as told."""

from __future__ import annotations

import re
from collections.abc import Callable

SHOWN = re.compile(r"<(question|(?:first_|second_)?answer(?:_[AB])?)>\n(.*?)\n</\1>", re.DOTALL)
Decide = Callable[[str, list[str]], str]


def decided(decide: Decide) -> Callable[[str], str]:
    """What to give a FakeTeacher as `answer`: `decide(question, answers)` gives the reply."""

    def answer(prompt: str) -> str:
        (_, question), *shown = SHOWN.findall(prompt)
        return decide(question, [text for _, text in shown])

    return answer


def says_same(question: str, answers: list[str]) -> str:
    """The same where both start alike."""
    same = answers[0].split()[0] == answers[1].split()[0]
    return f"Verdict: {'same' if same else 'different'}"


def prefers_right(question: str, answers: list[str]) -> str:
    """Grades, and compares: what is `right` is better."""
    if len(answers) == 1:
        return f"Grade: {9 if answers[0] == 'right' else 2}"
    flags = [answer == "right" for answer in answers]
    return f"Verdict: {'tie' if flags[0] == flags[1] else 'first' if flags[0] else 'second'}"


def prefers_first(question: str, answers: list[str]) -> str:
    """Bent by the place."""
    return "Grade: 5" if len(answers) == 1 else "Verdict: first"
