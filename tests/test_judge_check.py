"""A check whose verdicts a language model gives."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny as tiny_model
from conftest import Ran
from fakes import KEY, MODEL, FakeTeacher
from judge_fake import decided, says_same

from edgedistill.check_specs import JudgeCheck
from edgedistill.checks import about, check_identity, kept_in, require_usable, thrown_by
from edgedistill.checks.judge import JudgeChecker
from edgedistill.errors import (
    ConfigError,
    RuntimeFailure,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
)
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.fidelity import EvalRow
from edgedistill.likeness import Given, likeness_of, ready_checker
from edgedistill.progress import Silent
from edgedistill.prompts import Prompts
from edgedistill.recipe import load_recipe
from edgedistill.result_file import read_result
from edgedistill.student import TOKENIZER_GGUF


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)


def spec(url: str, **more: Any) -> JudgeCheck:
    given = {"model": MODEL, "api_key_env": "A_KEY", "attempts": 1, "base_url": url, **more}
    return JudgeCheck(kind="judge", **given)


@pytest.fixture
def judge() -> Iterator[FakeTeacher]:
    with FakeTeacher(answer=decided(says_same)) as teacher:
        yield teacher


def test_the_same_where_both_orders_say_so(judge: FakeTeacher) -> None:
    checker = about(JudgeChecker(spec(judge.base_url)), "how many?")
    assert checker.same("five of them", "five")
    assert not checker.same("six of them", "five")
    assert judge.calls == 2 + 1  # the second order is not asked about once the first says different
    assert "<question>\nhow many?" in judge.requests[0].prompt


def test_a_judge_that_goes_by_the_place_calls_nothing_the_same() -> None:
    def by_place(question: str, answers: list[str]) -> str:
        return f"Verdict: {'same' if answers[0] == 'five' else 'different'}"

    with FakeTeacher(answer=decided(by_place)) as judge:
        assert not JudgeChecker(spec(judge.base_url)).same("five!", "five")
    assert judge.calls == 2


@pytest.mark.parametrize(
    ("answer", "teacher", "same"), [("five", " five\n", True), ("", "five", False), ("", "", False)]
)
def test_what_needs_no_judge(judge: FakeTeacher, answer: str, teacher: str, same: bool) -> None:
    assert JudgeChecker(spec(judge.base_url)).same(answer, teacher) is same
    assert judge.calls == 0


def test_nothing_is_asked_twice(judge: FakeTeacher, tmp_path: Path) -> None:
    kept = kept_in(spec(judge.base_url), tmp_path / "traces.db")
    assert isinstance(kept, JudgeCheck)
    for _ in range(2):
        checker = JudgeChecker(kept)
        assert checker.same("five of them", "five")
        assert checker.same("five of them", "five")
        checker.close()
    assert judge.calls == 2


def test_what_cannot_be_read_is_not_the_same_and_told() -> None:
    with FakeTeacher(answer=lambda prompt: "As an AI, who knows?") as judge:
        checker = JudgeChecker(spec(judge.base_url))
        assert not checker.same("a", "b")
        assert not about(checker, "sure?").same("Yes", "No")
        assert not about(checker, "really?").same("Yes", "No")
    told = "the judge gave no verdict that can be read: 'As an AI, who knows?'"
    assert thrown_by(checker) == {"a": told, "Yes (to: sure?)": told, "Yes (to: really?)": told}


def test_one_failed_call_is_told_and_three_in_a_row_end_it() -> None:
    with FakeTeacher(script={"*": ["500", "ok", "ok", "500!"]}, answer=decided(says_same)) as judge:
        checker = JudgeChecker(spec(judge.base_url))
        assert not checker.same("a", "b")
        assert checker.same("c d", "c")
        assert not checker.same("e", "f")
        assert not checker.same("g", "h")
        with pytest.raises(TeacherError, match=r"3 calls of the judge in a row failed.*HTTP 500"):
            checker.same("i", "j")
        with pytest.raises(TeacherError, match="3 calls of the judge in a row"):
            checker.same("k", "l")
    assert set(thrown_by(checker)) == {"a", "e", "g"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, TeacherUnreachable, "is check.base_url right"),
        ({"model": "other"}, TeacherRefused, "check check.model"),
        ({"api_key_env": "NOT_SET"}, TeacherRefused, "NOT_SET is not set"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_known_before(
    judge: FakeTeacher, change: dict[str, str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        require_usable(JudgeChecker(spec(judge.base_url, **change)))


def test_a_judge_is_at_rest_while_a_model_is_measured(judge: FakeTeacher, tmp_path: Path) -> None:
    kept = kept_in(spec(judge.base_url), tmp_path / "traces.db")
    checker = ready_checker(kept)
    assert isinstance(checker, JudgeChecker)
    assert (judge.calls, checker.is_open) == (1, False)
    row = EvalRow("p", "how many?", "five", "", False)
    given, prompts = [Given(row, "five of them")], Prompts("prompts", "digest", (row,))
    made = likeness_of(prompts, kept, checker, given, [], 0, 0, Silent())
    assert made["agreement"]["value"] == 1
    assert (judge.calls, checker.is_open) == (3, False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_local_judge_that_dies_is_named_as_the_cause(tmp_path: Path) -> None:
    tiny_model.tiny_student(tmp_path)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    file = tmp_path / "judge.gguf"
    write_gguf(tmp_path, tmp_path / TOKENIZER_GGUF, file, made_from, Silent())
    checker = JudgeChecker(JudgeCheck(kind="judge", model="m", weights=file, attempts=1))
    known = psutil.Process().children()
    try:
        checker.same("five of them", "five")  # whatever it says
        (server,) = set(psutil.Process().children()) - set(known)
        server.kill()
        while server.status() != psutil.STATUS_ZOMBIE:  # whoever started it reaps it
            time.sleep(0.01)
        with pytest.raises(RuntimeFailure, match=r"(?s)judge\.gguf: its server died.*SIGKILL"):
            [checker.same(answer, "five") for answer in "abc"]  # three failed calls end it
        assert not checker.is_open
    finally:
        checker.close()


def test_where_it_is_asked_decides_nothing_and_how_does() -> None:
    here, there = (check_identity(spec(f"https://{host}/v1")) for host in ("a", "b"))
    assert here == there
    other = check_identity(spec("https://a/v1", rubric="Only the number counts."))
    assert other["prompt_version"] != here["prompt_version"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("kind: judge\n  model: m", "give either base_url or weights"),
        ("kind: judge\n  model: m\n  weights: no.gguf", "there is no file"),
        ("kind: judge\n  model: m\n  base_url: host", "must match the pattern"),
        ("kind: judge\n  model: m\n  base_url: https://h/v1/chat/completions/", "client adds it"),
        ("kind: judge\n  model: m\n  base_url: https://me:s3cret@h/v1", "for all to read"),
        ("kind: judge\n  model: m\n  base_url: https://h/v1?key=s3cret", "for all to read"),
        ("kind: judge\n  model: m\n  base_url: https://h/v1\n  api_key_env: none", "leave it out"),
        ("kind: judge\n  model: m\n  base_url: https://h/v1\n  rubrik: x", "rubrik"),
    ],
)
def test_a_recipe_that_names_no_judge(tiny: Path, lines: str, said: str) -> None:
    text = tiny.read_text("utf-8")
    tiny.write_text(text.replace("kind: label\n  labels: [urgent, normal]", lines), "utf-8")
    with pytest.raises(ConfigError, match=said) as told:
        load_recipe(tiny)
    assert "s3cret" not in str(told.value)


def test_bench_asks_the_judge_of_a_recipe_and_keeps_what_it_says(
    run: Callable[..., Ran], tiny: Path, here: Path
) -> None:
    """Teacher and judge are one server here; what is measured is asked at another."""

    def as_both(prompt: str) -> str:
        return decided(says_same)(prompt) if "<question>" in prompt else "urgent, it is"

    with FakeTeacher(answer=as_both) as both, FakeTeacher(answer=lambda p: "urgent!") as measured:
        check = f"kind: judge\n  model: {MODEL}\n  base_url: {both.base_url}\n  api_key_env: A_KEY"
        text = tiny.read_text("utf-8").replace("kind: label\n  labels: [urgent, normal]", check)
        text = text.replace("http://127.0.0.1:9/v1", both.base_url)
        text = text.replace("some-model", f"{MODEL}\n  api_key_env: A_KEY")
        tiny.write_text(text, "utf-8")
        words = ["--model", MODEL, "--api-key-env", "A_KEY", "--recipe", "tiny", "--repeats", "2"]
        done = run("bench", measured.base_url, *words, "--out", "r.json", "--worst", "1")
        assert done.code == 0, done.err
        before = both.calls
        again = run("bench", measured.base_url, *words)
    assert again.code == 0, again.err
    assert both.calls == before + 1  # to see that it answers
    likeness = read_result(here / "r.json").likeness
    assert likeness is not None
    assert likeness["agreement"]["value"] == 0  # "urgent!" and "urgent," begin otherwise
    assert "the worst 1 of" in done.out
