"""Results whose answers a language model judges, over a real connection on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from fakes import KEY, MODEL, FakeTeacher
from judge_fake import Decide, decided, prefers_first, prefers_right
from sample_results import sample_result, without_prompts, write

from edgedistill.result_file import Result

Run = Callable[..., Ran]
AT = ("--judge", "https://host/v1", "--model", "m")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)


def result(answers: Sequence[str], name: str = "student", digest: str = "mix-1") -> Result:
    """Gold calls `right` right; the teacher's first answer is wrong."""
    rows = [
        {"id": f"p{i}", "prompt": f"q{i}", "answer": answer, "teacher": "right" if i else "poor",
         "gold": answer == "right", "teacher_gold": i > 0}
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    made = sample_result(name=name, digest=digest)
    return replace(made, likeness={"rows": rows, "agreement": None, "gold": None})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    held = {"a": ["right", "wrong", "right"], "b": ["right", "right", "bad"]}
    return [str(write(result(held[n], n), tmp_path / f"{n}.json")) for n in held]


def judged(run: Run, teacher: FakeTeacher, *words: str) -> Ran:
    place = ["--judge", teacher.base_url, "--model", MODEL, "--api-key-env", "A_KEY"]
    return run("judge", *words, *place, "--workspace", "ws")


def asked(decide: Decide = prefers_right, **more: Any) -> FakeTeacher:
    return FakeTeacher(answer=decided(decide), **more)


def test_a_result_against_the_teacher(run: Run, here: Path, files: list[str]) -> None:
    with asked() as teacher:
        done = judged(run, teacher, files[0], "--json")
    assert done.code == 0, done.err
    (grades,), (pairs,) = done.json["grades"], done.json["pairs"]
    assert [row["grade"] for row in grades["rows"]] == [9, 2, 9]
    assert grades["gold"]["accuracy"]["value"] == 1
    assert (pairs["second"], pairs["win"], pairs["tie"], pairs["loss"]) == ("the teacher", 1, 1, 1)
    assert (pairs["equal"], pairs["gold"]["accuracy"]["value"]) == (1, 1)
    sent = {each.headers["X-Trace-Id"] for each in teacher.requests}
    kept = {row["trace_id"] for row in grades["rows"]}
    assert sent == kept | {name for row in pairs["rows"] for name in row["trace_ids"]}
    assert done.json["judge"]["answered"] == [f"{MODEL}-2026"]
    assert set(done.json["judge"]["prompt_versions"]) == {"grade", "pairs"}


def test_two_results_against_each_other(run: Run, here: Path, files: list[str]) -> None:
    with asked() as teacher:
        done = judged(run, teacher, *files, "--ask", "pairs")
    assert done.code == 0, done.err
    assert "b against a: 1 won, 1 tied, 1 lost" in done.out
    assert "the right one wins in 100.0 %" in done.out
    assert teacher.calls == 4  # two pairs differ


def test_a_judge_bent_by_the_place_decides_nothing(run: Run, here: Path, files: list[str]) -> None:
    with asked(prefers_first) as teacher:
        done = judged(run, teacher, *files, "--ask", "pairs", "--json")
    (pairs,) = done.json["pairs"]
    assert (pairs["tie"], pairs["position"]["flips"]["value"]) == (3, 1)
    assert pairs["position"]["to_first"]["value"] == 1


def test_facts_that_the_teacher_does_not_state(run: Run, here: Path, files: list[str]) -> None:
    def adds(question: str, answers: list[str]) -> str:
        return f"Verdict: {'yes' if answers[1] == 'wrong' else 'no'}"

    with asked(adds) as teacher:
        done = judged(run, teacher, files[0], "--ask", "drift", "--json")
    (drift,) = done.json["drift"]
    assert [row["adds"] for row in drift["rows"]] == [False, True, False]
    assert teacher.calls == 2  # the third is the teacher's, word by word


def test_what_was_answered_is_not_asked_again(run: Run, here: Path, files: list[str]) -> None:
    with asked(script={"*": ["ok", "ok", "401!"]}) as teacher:
        first = judged(run, teacher, files[0], "--ask", "grade")
    assert first.code == 1
    with asked() as teacher:
        second = judged(run, teacher, files[0], "--ask", "grade", "--max-calls", "3", "--json")
    assert second.code == 0, second.err
    assert second.json["calls"]["kept"] + second.json["calls"]["asked"] == 3


def test_verdicts_that_cannot_be_read_are_counted(run: Run, here: Path, files: list[str]) -> None:
    with asked(lambda question, answers: "Hard to say.") as teacher:
        done = judged(run, teacher, files[0])
    assert done.code == 0, done.err
    assert "not known: no grade could be read" in done.out
    assert "7 verdicts that cannot be read" in done.out
    assert "'Hard to say.'" in done.out


def test_no_text_gives_orders_to_the_terminal(run: Run, here: Path, tmp_path: Path) -> None:
    orders = "\x1b]0;owned\x07\x1b[2J\x9b1A"
    made = result(["right"])
    assert made.token_mix is not None
    made = replace(made, token_mix={**made.token_mix, "source": orders})
    file = str(write(made, tmp_path / "a.json"))
    with asked(lambda question, answers: f"Hm {orders}.") as teacher:
        done = judged(run, teacher, file)
    shown = [done, *(run("compare", file, "--format", each) for each in ("table", "markdown"))]
    for each in shown:
        assert each.code == 0, each.err
        assert "\ufffd]0;owned" in each.out
        assert not set("\x1b\x07\x9b") & set(each.out + each.err)


def test_out_keeps_it(run: Run, here: Path, files: list[str]) -> None:
    with asked() as teacher:
        judged(run, teacher, files[0], "--out", "j.json", "--sample", "2")
    kept = json.loads((here / "j.json").read_text("utf-8"))
    assert (kept["kind"], len(kept["grades"][0]["rows"])) == ("edgedistill-judgement", 2)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--max-calls", "2"], 2, "this makes 7 calls, and --max-calls allows 2"),
        (["--out", "no/j.json"], 2, "there is no folder no"),
        (["--recipe", "support-sql"], 2, "is sql-execution, and names no judge"),
    ],
)
def test_words(run: Run, here: Path, files: list[str], words: list[str], code: int, said: str
) -> None:  # fmt: skip
    with asked() as teacher:
        done = judged(run, teacher, files[0], *words)
    assert (done.code, said in done.err) == (code, True), done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "give --judge URL|FILE"),
        (["--judge", "https://host/v1"], 2, "a URL needs --model ID"),
        (["--judge", "nowhere.gguf"], 2, "there is no such file"),
        (["--recipe", "support-sql"], 2, "is sql-execution, and names no judge"),
        (["--judge", "https://me:pw@host/v1", "--model", "m"], 2, "would be in the result"),
        ([*AT, "--api-key-env", "none"], 2, "--api-key-env: leave it out for no key"),
        ([*AT, "--api-key-env", "A KEY"], 2, "--api-key-env: String should match"),
    ],
)
def test_no_judge(run: Run, here: Path, files: list[str], words: list[str], code: int, said: str
) -> None:  # fmt: skip
    done = run("judge", files[0], *words)
    assert (done.code, said in done.err) == (code, True), done.err


def test_the_judge_and_the_rubric_of_a_recipe(
    run: Run, here: Path, tiny: Path, files: list[str]
) -> None:
    with asked() as teacher:
        text = tiny.read_text("utf-8")
        check = f"kind: judge\n  model: {MODEL}\n  base_url: {teacher.base_url}\n"
        check += "  api_key_env: A_KEY\n  rubric: Only colour counts."
        tiny.write_text(text.replace("kind: label\n  labels: [urgent, normal]", check), "utf-8")
        words = [files[0], "--recipe", "tiny", "--workspace", "ws", "--json"]
        of_recipe = run("judge", *words)
        ignored = {
            name: run("judge", *words[:-1], name, value)
            for name, value in (("--model", "m"), ("--max-tokens", "9"), ("--api-key-env", "A"))
        }
        named = judged(run, teacher, files[0], "--recipe", "tiny", "--json")
        own = judged(run, teacher, files[0], "--recipe", "tiny", "--rubric", "Shape.", "--json")
    told = [done.json["judge"]["rubric"] for done in (of_recipe, named, own)]
    assert told == ["Only colour counts.", "Only colour counts.", "Shape."]
    for name, done in ignored.items():
        assert (done.code, f"{name} is for --judge" in done.err) == (2, True), done.err


def test_a_file_takes_no_key(run: Run, here: Path, files: list[str]) -> None:
    (here / "judge.gguf").write_bytes(b"GGUF")
    done = run("judge", files[0], "--judge", "judge.gguf", "--api-key-env", "A_KEY")
    assert (done.code, "--api-key-env is for a URL" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (without_prompts(sample_result(1)), "it was measured without prompts"),
        (sample_result(1), "answers without their prompts: it is of an older edgedistill"),
        (result(["right"], digest="mix-2"), "they answer other prompts"),
    ],
)
def test_results_that_cannot_be_judged(
    run: Run, here: Path, files: list[str], other: Result, said: str
) -> None:
    write(other, here / "other.json")
    with asked() as teacher:
        done = judged(run, teacher, files[0], "other.json")
    assert (done.code, said in done.err, teacher.calls) == (1, True, 0), done.err


def test_a_judge_that_is_down(run: Run, here: Path, files: list[str]) -> None:
    with asked() as teacher:
        pass
    done = judged(run, teacher, files[0])
    assert (done.code, "no connection to the judge in 3 attempts" in done.err) == (1, True)
    assert "is --judge right?" in done.err


def test_one_that_fails_too_often_names_the_command_that_asks_again(
    run: Run, here: Path, files: list[str]
) -> None:
    with asked(script={"*": ["garbage!"]}) as teacher:
        done = judged(run, teacher, files[0])
    assert done.code == 1
    assert "the judge fails too often" in done.err
    assert "`judge` with --retry-failed asks the failed ones again" in done.err
    assert "build" not in done.err
