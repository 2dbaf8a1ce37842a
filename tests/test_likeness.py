"""What a result holds of how like the teacher's its answers are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group
from rich.text import Text

from edgedistill.check_specs import PythonCheck, TextCheck
from edgedistill.checks.own import PythonChecker
from edgedistill.console import Shown
from edgedistill.errors import EdgedistillError, RuntimeFailure, TeacherError, WeightsError
from edgedistill.fidelity import EvalRow
from edgedistill.likeness import Given, likeness_of, notes_of, worst
from edgedistill.likeness_table import likeness as shown
from edgedistill.progress import Silent
from edgedistill.prompts import Prompts
from edgedistill.refusing import refuses

EXACT = TextCheck(kind="exact")
REFUSALS = ("i cannot", "i'm sorry")


def row(name: str, answer: str = "5 GB", reference: str | None = None) -> EvalRow:
    return EvalRow(name, f"how much is {name}?", answer, "", False, reference=reference)


def known(*rows: EvalRow, **more: Any) -> Prompts:
    return Prompts("prompts", "digest", rows, refusals=REFUSALS, **more)


class Same:
    """A check for the same text, that a judge may stand behind."""

    description = "same text"

    def __init__(self, fails_on: str = "", error: type[EdgedistillError] = TeacherError) -> None:
        self._fails_on, self._error = fails_on, error

    def invalid(self, answer: str) -> str | None:
        return None

    def same(self, answer: str, teacher: str) -> bool:
        if self._fails_on and answer == self._fails_on:
            raise self._error("the judge is gone")
        return answer == teacher


def found(
    *texts: str,
    check: TextCheck = EXACT,
    fails_on: str = "",
    error: type[EdgedistillError] = TeacherError,
    **more: Any,
) -> dict[str, Any]:
    rows = [row(f"p{i}", reference="5 GB") for i in range(len(texts))]
    given = [Given(one, text) for one, text in zip(rows, texts, strict=True)]
    prompts = known(*rows, **more)
    return likeness_of(prompts, check, Same(fails_on, error), given, [], 0, 0, Silent())


def lines(made: dict[str, Any]) -> list[str]:
    return [part.plain for part in shown(made) if isinstance(part, Text)]


def test_a_row_can_be_read_months_later() -> None:
    made = found("5 GB", tags={"p0": ("size",)})
    assert made["rows"] == [
        {"id": "p0", "answer": "5 GB", "prompt": "how much is p0?", "teacher": "5 GB",
         "reference": "5 GB", "tags": ["size"], "refuses": False, "same": True, "gold": True,
         "teacher_gold": True, "drifts": False, "teacher_drifts": False},
    ]  # fmt: skip


def test_refusals_are_counted() -> None:
    made = found("5 GB", "I\u2019m sorry, no.")
    assert [each["refuses"] for each in made["rows"]] == [False, True]
    assert made["refusals"]["value"] == 0.5


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("I CANNOT help", "stop", True),
        ("You cannot, and I cannot", "stop", False),
        ("Well", "content_filter", True),
        ("", "stop", False),
    ],
)
def test_what_a_refusal_is(text: str, reason: str, expected: bool) -> None:
    assert refuses(text, REFUSALS, reason) is expected


def test_answers_to_what_the_teacher_refuses_are_regressions() -> None:
    refused = [Given(row(n, "I cannot."), t) for n, t in (("r1", "Sure!"), ("r2", "I cannot."))]
    made = likeness_of(known(), EXACT, Same(), [], [*refused, Given(row("r3"), "")], 0, 0, Silent())
    assert [each["answers"] for each in made["refused"]] == [True, False, False]
    assert not any("refuses" in each for each in made["refused"])
    assert made["regressions"]["n"] == 3
    assert any("(r1)" in line for line in lines(made))


def test_drift_is_what_nobody_said_beside_its_floor() -> None:
    made = found("5 GB", "7 GB or 8 GB")
    assert [each["drifts"] for each in made["rows"]] == [False, True]
    assert [each["text"] for each in made["rows"][1]["asserts"]] == ["7 GB", "8 GB"]
    assert (made["drift"]["value"], made["drift_per_answer"]) == (0.5, 1.0)
    assert made["drift_floor"]["value"] == 0


def test_drift_is_left_out_where_it_says_nothing() -> None:
    made = found("5 GB", "7 GB", check=TextCheck(kind="label"))
    assert made["drift"] is None
    assert any("not measured: a label" in line for line in lines(made))


def test_the_worst_come_first() -> None:
    rows = [
        {"id": "near", "same": False, "gold": False, "answer": "a b c", "teacher": "a b d"},
        {"id": "far", "same": False, "gold": False, "answer": "x", "teacher": "a b d"},
        {"id": "right", "same": False, "gold": True, "answer": "x", "teacher": "a b d"},
        {"id": "same", "same": True, "gold": True, "answer": "a", "teacher": "a"},
    ]
    assert worst(rows) == ["far", "near", "right"]


def test_an_answer_gives_no_orders_to_the_terminal() -> None:
    made = found("\x1b]0;owned\x07 \x1b[2J \x9b1A")
    console = Console(file=io.StringIO(), width=100)
    console.print(Shown(Group(*shown(made))))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "\ufffd[2J" in said
    assert not set("\x1b\x07\x9b") & set(said)


@pytest.mark.parametrize("error", [TeacherError, RuntimeFailure, WeightsError])
def test_a_judge_that_ends_midway_leaves_no_verdicts_and_is_told(
    error: type[EdgedistillError],
) -> None:
    """A local one is started again for this: it may not come back."""
    made = found("5 GB", "7 GB", "5 GB", fails_on="7 GB", error=error)
    assert made["agreement"] is made["gold"] is None
    assert [each["answer"] for each in made["rows"]] == ["5 GB", "7 GB", "5 GB"]
    assert any("the judge is gone" in note for note in notes_of(made))


THROWS = """
def same(answer, teacher):
    if answer.startswith("?"):
        raise ValueError("no number")
    return answer == teacher
"""


def test_what_a_check_throws_is_counted_by_prompt_and_by_model(tmp_path: Path) -> None:
    """One check serves all models that are measured in turn."""
    file = tmp_path / "check.py"
    file.write_text(THROWS, "utf-8")
    check, checker = PythonCheck(kind="python", file=file), PythonChecker(file, 20)
    rows = [row(name, "?5", "5 GB") for name in ("p0", "p1")] + [row("p2", "5 GB", "5 GB")]

    def judged(*texts: str) -> dict[str, Any]:
        given = [Given(one, text) for one, text in zip(rows, texts, strict=True)]
        return likeness_of(known(*rows), check, checker, given, [], 0, 0, Silent())

    try:
        bad, good = judged("?", "?", "5 GB"), judged("5 GB", "5 GB", "5 GB")
    finally:
        checker.close()
    assert (list(bad["threw"]), good["threw"]) == (["p0", "p1"], {})
    assert (
        bad["teacher_threw"]
        == good["teacher_threw"]
        == dict.fromkeys(("p0", "p1"), "ValueError: no number")
    )
    told = "the check gave no verdict on 2 of the teacher's answers against their references, "
    told += "which count as wrong; the first, '?5': ValueError: no number"
    assert notes_of(good) == [told]
    assert notes_of(bad) == [
        "the check gave no verdict on 2 answers, which count as not the same; the first, '?': "
        "ValueError: no number",
        told,
    ]
