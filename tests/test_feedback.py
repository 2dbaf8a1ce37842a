"""Which answers are right, who was asked, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.check_specs import TextCheck
from edgedistill.checks import make_checker
from edgedistill.distill.feedback import REVIEW, Assessed, Desk, assess
from edgedistill.errors import CollectError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, CollectSpec, CurateSpec

LABELS = TextCheck(kind="label", labels=("yes", "no", "maybe"))
COLLECT = CollectSpec(attempts=1, max_failed_share=1.0)


def rows(count: int = 1) -> list[EvalRow]:
    return [EvalRow(f"r{i}", f"is it {i}? {{first}}", "yes", "p", True) for i in range(count)]


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeTeacher]]:
    monkeypatch.setenv("FAKE_KEY", KEY)
    opened: list[FakeTeacher] = []

    def start(answer: Callable[[str], str], **rest: Any) -> FakeTeacher:
        opened.append(FakeTeacher(answer=answer, **rest))
        return opened[-1].__enter__()

    yield start
    for each in opened:
        each.__exit__(None, None, None)


def desk(server: FakeTeacher | None, out: Path, collect: CollectSpec = COLLECT) -> Desk:
    url = "http://127.0.0.1:9/v1" if server is None else server.base_url
    held = ApiTeacher(
        kind="api", base_url=url, model=MODEL, licence="none", api_key_env="FAKE_KEY",
        system="Say yes or no.",
    )  # fmt: skip
    return Desk(held, collect, CurateSpec(), out)


def ask(
    answers: Sequence[Sequence[str]],
    feedback: Any,
    at: Desk,
    wanted: Any = "worse",
    calls_left: int = 100,
    check: TextCheck = LABELS,
) -> Assessed:
    checker = make_checker(check)
    return assess(rows(len(answers)), answers, feedback, wanted, checker, at, calls_left, Silent())


def test_the_check_sorts_and_asks_nobody(tmp_path: Path) -> None:
    found = ask([["no", "Yes.", "maybe", "maybe", "yes"], ["yes"]], "check", desk(None, tmp_path))
    first, second = found.verdicts
    assert (first.right, first.worse, first.better) == (("Yes.", "yes"), "maybe", "yes")
    assert (second.right, second.worse) == (("yes",), None)
    assert found.facts["disagreements"] == 1 == found.facts["wrong"]
    assert found.facts["teacher_calls"] == 0
    assert not (tmp_path / "traces.db").exists()


def prefers(answer: str) -> Callable[[str], str]:
    """A judge that finds one answer better, wherever it stands."""
    return lambda asked: "A" if f"Answer A:\n{answer}\n" in asked else "Answer B is."


@pytest.mark.parametrize(
    ("judge", "wrong"),
    [
        (prefers("yes"), True),
        (prefers("no"), False),
        (lambda asked: "A", False),  # it favours a place
        (lambda asked: "SAME", False),
        (lambda asked: "A, or rather B", False),
        (lambda asked: "who knows", False),
    ],
)
def test_an_answer_is_wrong_where_it_loses_in_both_orders(
    judge: Callable[[str], str], wrong: bool, teacher: Any, tmp_path: Path
) -> None:
    server = teacher(judge)
    found = ask([["no", "no", "maybe"]], "judge", desk(server, tmp_path))
    (verdict,) = found.verdicts
    assert (verdict.worse, verdict.right) == (("no", ()) if wrong else (None, ("no",)))
    assert found.facts["teacher_calls"] == server.calls == 2
    first, second = (received.body["messages"] for received in server.requests)
    assert first[0]["role"] == "system"
    assert "Say yes or no." in first[1]["content"]
    assert "is it 0? {first}" in first[1]["content"]
    assert {"Answer A:\nyes" in m[1]["content"] for m in (first, second)} == {True, False}


@pytest.mark.parametrize(
    ("said", "right", "worse", "better"),
    [
        ("```\nYes\n```", (), "no", "Yes"),
        ("no", ("no",), None, "yes"),
        ("perhaps", (), None, "yes"),  # no label: nothing is known
    ],
)
def test_the_teacher_says_what_it_prefers(
    said: str, right: Any, worse: Any, better: str, teacher: Any, tmp_path: Path
) -> None:
    server = teacher(lambda asked: said)
    (verdict,) = ask([["no"]], "preferred", desk(server, tmp_path)).verdicts
    assert (verdict.right, verdict.worse, verdict.better) == (right, worse, better)
    (received,) = server.requests
    roles = [message["role"] for message in received.body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert received.prompt == REVIEW


def test_no_more_calls_than_are_left_and_none_is_paid_twice(teacher: Any, tmp_path: Path) -> None:
    server, answers = teacher(prefers("yes")), [["no"]] * 4
    found = ask(answers, "judge", desk(server, tmp_path), calls_left=5)
    assert [v.worse for v in found.verdicts] == ["no", "no", None, None]
    assert found.facts["prompts_beyond_max_calls"] == 2
    assert found.facts["teacher_calls"] == server.calls == 4
    again = ask(answers, "judge", desk(server, tmp_path), calls_left=5)
    assert again == found
    assert server.calls == 4


def test_each_call_is_told_with_its_provenance(teacher: Any, tmp_path: Path) -> None:
    found = ask([["no"]], "judge", desk(teacher(prefers("yes")), tmp_path))
    assert len({each["trace_id"] for each in found.told}) == 2
    for each in found.told:
        assert each["purpose"] == "judge"
        assert (each["model_asked"], each["model_answered"]) == (MODEL, f"{MODEL}-2026")
        assert each["prompt_version"].startswith("judge-")
    assert (found.facts["prompt_tokens"], found.facts["completion_tokens"]) == (14, 6)


def test_what_the_check_can_tell_is_not_asked(teacher: Any, tmp_path: Path) -> None:
    server = teacher(prefers("yes"))
    at = desk(server, tmp_path)
    found = ask([["yes"], ["gibberish"], [""], ["no", "yes"]], "judge", at, wanted="right")
    assert [v.worse for v in found.verdicts] == [None, "gibberish", "", None]
    assert server.calls == 0


def test_a_call_that_failed_says_nothing(teacher: Any, tmp_path: Path) -> None:
    server = teacher(prefers("yes"), script={"*": ["500!"]})
    found = ask([["no"]], "judge", desk(server, tmp_path))
    (verdict,) = found.verdicts
    assert (verdict.worse, verdict.right) == (None, ())
    assert found.facts["failed_calls"] == 2
    calls, again = server.calls, desk(server, tmp_path)
    ask([["no"]], "judge", again)
    assert server.calls == calls
    ask([["no"]], "judge", replace(again, retry_failed=True))
    assert server.calls == calls + 2
    with pytest.raises(CollectError, match=r"(?s)calls failed.*\n  `build` with --retry-failed"):
        ask([["no"]], "judge", desk(server, tmp_path / "b", CollectSpec(attempts=1)))


def test_what_shapes_a_verdict_is_in_its_identity(tmp_path: Path) -> None:
    here = desk(None, tmp_path)
    assert here.identity() == desk(None, tmp_path / "elsewhere").identity()
    other = here.teacher.model_copy(update={"system": "Say no."})
    assert Desk(other, COLLECT, CurateSpec(), tmp_path).identity() != here.identity()
