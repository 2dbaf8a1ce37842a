"""A server measured over a real connection on loopback, and what is kept when it fails."""

from __future__ import annotations

import json
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.check_specs import TextCheck
from edgedistill.errors import TeacherError, UsageError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Silent, SilentTask, Task
from edgedistill.prompts import Prompts
from edgedistill.result_file import read_result, write_result
from edgedistill.server_prompt import asked_server
from edgedistill.server_sitting import ServerPlan, ServerSitting, sit_at

COUNT = 6


def prompts(count: int = COUNT) -> Prompts:
    rows = [
        EvalRow(
            f"p{i}", f"q{i}", f"answer to q{i}", "", seen=False, reference=f"answer to q{i % 3}"
        )
        for i in range(count)
    ]
    return Prompts("prompts.jsonl", "digest", rows)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)


def sit(teacher: FakeTeacher, **plan: Any) -> ServerSitting:
    asked = asked_server(teacher.base_url, MODEL, "A_KEY", max_tokens=9)
    given = {"prompts": prompts(), "passes": 2, "backoff_seconds": 0.01, **plan}
    return sit_at(asked, ServerPlan(check=TextCheck(kind="exact"), **given), Silent())


def test_every_pass_and_prompt_is_in_the_figures() -> None:
    with FakeTeacher(delay_seconds=0.05) as teacher:
        done = sit(teacher)
    figures = done.result.figures
    assert done.stopped is None
    shapes = {name: [len(group) for group in each.groups] for name, each in figures.items()}
    assert shapes["end_to_end_p50"] == shapes["time_to_first_token_p99"] == [COUNT] * 2
    assert shapes["inter_chunk_p95"] == [2 * COUNT] * 2  # "answer", " to", " q1"
    assert shapes["time_per_output_token_p50"] == [COUNT] * 2
    assert shapes["tokens_per_second"] == [1, 1]
    assert 0.05 <= figures["time_to_first_token_p50"].value <= figures["end_to_end_p50"].value
    assert figures["tokens_per_second"].value < 30 / 0.05  # usage says 30 tokens an answer
    assert not {"pp512", "tg128", "peak_memory", "load"} & set(figures)


def test_every_call_carries_its_provenance() -> None:
    with FakeTeacher() as teacher:
        done = sit(teacher)
    assert teacher.calls == 1 + 2 * COUNT  # one to warm up
    sent = {each.headers["X-Trace-Id"] for each in teacher.requests}
    assert done.result.likeness is not None
    assert {row["trace_id"] for row in done.result.likeness["rows"]} == sent
    assert (done.result.model["name"], done.result.model["answered"]) == (MODEL, [MODEL])
    assert done.result.settings["prompt_version"]
    assert teacher.requests[1].body["max_tokens"] == 9
    first, second = (
        [each.prompt for each in teacher.requests[start : start + COUNT]]
        for start in (1, 1 + COUNT)
    )
    assert sorted(first) == sorted(second)
    assert first != second  # another order


def test_answers_are_held_against_teacher_and_reference() -> None:
    with FakeTeacher() as teacher:
        likeness = sit(teacher).result.likeness
    assert likeness is not None
    assert (likeness["agreement"]["value"], likeness["gold"]["value"]) == (1.0, 0.5)
    assert likeness["unlike"] == 0


def test_without_usage_no_token_is_counted() -> None:
    with FakeTeacher(usage_in_stream=False) as teacher:
        figures = sit(teacher).result.figures
    assert {"inter_chunk_p50", "end_to_end_p50"} <= set(figures)
    assert not {"tokens_per_second", "time_per_output_token_p50"} & set(figures)


def test_a_server_on_this_machine_is_said_to_be() -> None:
    with FakeTeacher(cached=7) as teacher:
        result = sit(teacher).result
    assert result.device["cpu"]
    assert result.load["during"] is None  # its own work would be in it
    assert "cannot be told from others'" in result.notes[0]
    assert any(
        "100% of the prompts' tokens came from the server's cache" in n for n in result.notes
    )


def test_of_a_far_server_nothing_of_its_machine_is_known() -> None:
    with FakeTeacher() as teacher:
        # A spelling of this machine's address that only the system's resolver knows.
        url = teacher.base_url.replace("127.0.0.1", "127.1")
        asked = asked_server(url, MODEL, "A_KEY")
        result = sit_at(asked, ServerPlan(prompts(), passes=2), Silent()).result
    assert (result.device["address"], result.device["cpu"]) == (url, None)
    assert set(result.load.values()) == set(result.conditions.values()) == {None}
    assert "is not listened to" in result.notes[0]


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        result = sit(teacher).result
    write_result(result, tmp_path / "r.json")
    back = read_result(tmp_path / "r.json")
    assert json.loads(json.dumps(back.to_json())) == json.loads(json.dumps(result.to_json()))


@pytest.mark.parametrize("step", ["empty!", "empty"])
def test_empty_answers_have_no_first_token(step: str) -> None:
    with FakeTeacher({"q1": [step]}) as teacher:
        result = sit(teacher).result
    count = 2 if step.endswith("!") else 1
    said = "2 answers without text" if count == 2 else "1 answer without text"
    assert any(note.startswith(said) for note in result.notes)
    assert [len(g) for g in result.figures["end_to_end_p50"].groups] == [COUNT] * 2
    assert sum(map(len, result.figures["time_to_first_token_p50"].groups)) == 2 * COUNT - count
    assert result.likeness is not None
    assert result.likeness["unlike"] == (0 if count == 2 else 1)


def test_nothing_but_empty_answers() -> None:
    with FakeTeacher({"*": ["empty!"]}) as teacher:
        result = sit(teacher).result
    assert "end_to_end_p50" in result.figures
    assert "time_to_first_token_p50" not in result.figures


def test_a_prompt_that_fails_counts_for_nothing() -> None:
    with FakeTeacher({"q1": ["400!"]}) as teacher:
        done = sit(teacher)
    assert done.stopped is None
    assert done.result.settings["calls"] == {"planned": 12, "answered": 10, "failed": 2}
    assert any("2 calls failed" in n and "told to say 400" in n for n in done.result.notes)
    assert done.result.likeness is not None
    assert len(done.result.likeness["rows"]) == COUNT - 1


def test_a_stream_that_ends_in_the_middle_is_asked_again() -> None:
    with FakeTeacher({"q1": ["half"]}) as teacher:
        done = sit(teacher, passes=1)
    assert done.result.settings["calls"]["answered"] == COUNT
    assert any("1 call answered at a later try" in note for note in done.result.notes)


@pytest.mark.parametrize("streams", [1, 3])
def test_what_was_answered_before_a_server_died_is_kept(streams: int) -> None:
    with FakeTeacher({"q5": ["ok", "die"]}) as teacher:
        done = sit(teacher, streams=(streams,), passes=3)
    assert done.stopped is not None
    counts = done.result.settings["calls"]
    assert COUNT <= counts["answered"] < counts["planned"]
    assert any(
        note.startswith(f"ended after {counts['answered']} of 18") for note in done.result.notes
    )
    behind = "" if streams == 1 else "@s3"
    groups = done.result.figures[f"end_to_end_p50{behind}"].groups
    assert sum(map(len, groups)) == counts["answered"]


class Interrupted(Silent):
    """Ctrl-C while the eighth answer is told."""

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return InterruptedTask()


class InterruptedTask(SilentTask):
    left = 8

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_what_was_answered_before_ctrl_c_is_kept() -> None:
    with FakeTeacher() as teacher:
        asked = asked_server(teacher.base_url, MODEL, "A_KEY", max_tokens=9)
        done = sit_at(asked, ServerPlan(prompts(), passes=2), Interrupted())
    assert isinstance(done.stopped, KeyboardInterrupt)
    assert done.result.settings["calls"]["answered"] >= 8
    assert done.result.notes[-1].endswith("the figures are of these: interrupted")


def test_three_failed_calls_in_a_row_end_it() -> None:
    script = {f"q{i}": ["ok", "400!"] for i in range(1, COUNT)} | {"q0": ["ok", "ok", "400!"]}
    with FakeTeacher(script) as teacher:
        done = sit(teacher)
    assert str(done.stopped).startswith(f"{teacher.base_url}: 3 calls in a row failed, the last:")
    assert done.result.settings["calls"] == {"planned": 12, "answered": 6, "failed": 3}


def test_no_answer_but_the_first() -> None:
    script = {f"q{i}": ["400!"] for i in range(1, COUNT)} | {"q0": ["ok", "400!"]}
    with FakeTeacher(script) as teacher, pytest.raises(TeacherError, match="3 calls in a row"):
        sit(teacher)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("unstreamed!", "answer that is not streamed"),
        ("garbage!", "answer that is not streamed"),
        ("500!", r"HTTP 500 \(server error\)"),
        ("half!", "connection lost: the stream ended early"),
        ("401!", "the server refused the key.*\n.*check the key in A_KEY"),
    ],
)
def test_a_first_call_without_an_answer(step: str, said: str) -> None:
    with FakeTeacher({"*": [step]}) as teacher, pytest.raises(TeacherError, match=said) as caught:
        sit(teacher)
    assert caught.value.where == teacher.base_url


def test_several_streams_are_in_flight_at_once() -> None:
    with FakeTeacher(delay_seconds=0.2) as teacher:
        done = sit(teacher, streams=(1, 3), passes=2)
    assert teacher.calls == 1 + 2 * 2 * COUNT
    figures = done.result.figures
    assert {"end_to_end_p50", "end_to_end_p50@s3", "tokens_per_second@s3"} <= set(figures)
    assert teacher.most_at_once == 3
    assert figures["tokens_per_second@s3"].value <= 3 * 30 / 0.2  # usage says 30 tokens an answer


def test_one_stream_asks_one_prompt_at_a_time() -> None:
    with FakeTeacher(delay_seconds=0.05) as teacher:
        sit(teacher, passes=1)
    assert teacher.most_at_once == 1


def test_what_is_refused_before_a_call() -> None:
    with FakeTeacher() as teacher:
        with pytest.raises(UsageError, match="--streams 7: there are 6 prompts"):
            sit(teacher, streams=(1, 7))
        with pytest.raises(UsageError, match="this makes 13 calls, and --max-calls allows 12"):
            sit(teacher, max_calls=12)
    assert teacher.calls == 0


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"p{i}", "prompt": f"q{i}"}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path / "prompts.jsonl"


def words(url: str, mix: Path) -> list[str]:
    asked = ["--model", MODEL, "--api-key-env", "A_KEY", "--prompts", str(mix), "--repeats", "2"]
    return ["bench", url, *asked]


def test_the_command(run: Callable[..., Ran], mix: Path, tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        done = run(
            *words(teacher.base_url, mix), "--streams", "1,2", "-o", str(tmp_path / "r.json")
        )
    assert done.code == 0, done.err
    assert "17 calls: 1 to warm up, then 2 passes over 4 prompts" in done.err
    assert "asked as given: no system message, temperature 0, at most 128 tokens" in done.err
    for expected in (f"{MODEL} at {teacher.base_url}", "inter_chunk_p50", "tokens_per_second@s2"):
        assert expected in done.out
    assert read_result(tmp_path / "r.json").settings["streams"] == [1, 2]


@pytest.mark.parametrize("earlier", [2, 1])
def test_the_command_keeps_what_a_dying_server_gave(
    run: Callable[..., Ran], mix: Path, tmp_path: Path, earlier: int
) -> None:
    """In the second pass, or in the first, of which no interval is known."""
    with FakeTeacher({"q0": ["ok"] * earlier + ["die"]}) as teacher:
        done = run(*words(teacher.base_url, mix), "-o", str(tmp_path / "r.json"))
    assert done.code == 1
    assert "Answers so far are kept" in done.err or "calls in a row failed" in done.err
    assert "ended after" in done.out
    assert ("not known" in done.out) == (earlier == 1)
    kept = read_result(tmp_path / "r.json")
    assert math.isnan(kept.figures["end_to_end_p50"].low) == (earlier == 1)
    assert "NaN" not in (tmp_path / "r.json").read_text("utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("before", "out", "said"),
    [
        (0, False, "nothing of this sitting is kept"),
        (4, False, "what was answered is in the result above; the same command asks all again"),
        (4, True, "r.json; the same command asks all again and writes over it"),
    ],
)
def test_ctrl_c_tells_what_is_kept(
    run: Callable[..., Ran], mix: Path, here: Path, before: int, out: bool, said: str
) -> None:
    def answer(prompt: str) -> str:
        if teacher.calls > before:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return "urgent"

    with FakeTeacher(answer=answer) as teacher:
        to = ["-o", str(here / "r.json")] if out else []
        done = run(*words(teacher.base_url, mix), *to)
    assert done.code == 130
    assert done.err.endswith(f"{said}\n"), done.err
    assert "go on" not in done.err
    assert (here / "r.json").exists() == out


def test_a_recipes_held_out_prompts_are_asked_as_its_teacher_is(
    run: Callable[..., Ran], tiny: Path
) -> None:
    with FakeTeacher(answer=lambda prompt: "urgent") as teacher:
        text = tiny.read_text("utf-8").replace("http://127.0.0.1:9/v1", teacher.base_url)
        text = text.replace("some-model", f"{MODEL}\n  api_key_env: A_KEY\n  system: Be brief.")
        tiny.write_text(text, "utf-8")
        asked = ["--model", MODEL, "--api-key-env", "A_KEY", "--recipe", "tiny", "--sample", "3"]
        done = run("--json", "bench", teacher.base_url, *asked, "--repeats", "2")
    assert done.code == 0, done.err
    assert done.json["likeness"]["agreement"]["value"] == 1
    assert done.json["token_mix"] == {**done.json["token_mix"], "prompts": 3}
    assert done.json["settings"]["asked"] == "as the teacher of tiny"
    assert all(each.body["messages"][0]["content"] == "Be brief." for each in teacher.requests)


def test_nobody_there(run: Callable[..., Ran], mix: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        done = run(*words(url, mix))
    assert done.code == 1
    assert f"{url}: no connection to the server in 3 attempts" in done.err


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"/v1": ""}, 1, "ends where the API starts (/v1)"),
        ({"/v1": "/v1/chat/completions"}, 2, "/chat/completions is put behind the URL"),
        ({MODEL: "other"}, 1, "check --model"),
        ({"A_KEY": "NO_KEY"}, 1, "NO_KEY is not set"),
        ({"A_KEY": "WRONG"}, 1, "check the key in WRONG"),
        ({"--model": "--system"}, 2, "a URL needs --model ID"),
        ({"--repeats": "--threads"}, 2, "--threads is for a file, and this is a URL"),
    ],
)
def test_bad_words(
    run: Callable[..., Ran], mix: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WRONG", "wrong")
    with FakeTeacher() as teacher:
        given = words(teacher.base_url, mix)
        for old, new in changes.items():
            given = [word.replace(old, new) if word != str(mix) else word for word in given]
        done = run(*given)
    assert (done.code, said in done.err) == (code, True), done.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--streams", "0"], "0 is below 1"),
        (["--streams", "1,x"], "no list of whole numbers"),
        (["--streams", ""], "no list of whole numbers"),
        (["--max-calls", "0"], "--max-calls"),
        (["--as", "student"], "--as is for a URL with --recipe"),
        (["--model", "m"], "a URL is measured on prompts: give --prompts or --recipe"),
    ],
)
def test_bad_options(run: Callable[..., Ran], given: list[str], said: str) -> None:
    done = run("bench", "http://127.0.0.1:9/v1", "--model", "m", *given)
    assert (done.code, said in done.err) == (2, True), done.err


def test_options_of_a_url_are_not_for_a_file(run: Callable[..., Ran]) -> None:
    done = run("bench", "x.gguf", "--streams", "2")
    assert (
        done.code,
        "--streams is for a URL (http:// or https://), and this is a file" in done.err,
    ) == (2, True)


def test_what_the_teacher_refuses_is_asked_beside_the_passes() -> None:
    refused = EvalRow("r1", "how to do harm", "I cannot.", "", seen=False)
    with FakeTeacher() as teacher:
        done = sit(teacher, prompts=replace(prompts(), refused=[refused]))
    assert teacher.calls == 1 + 2 * COUNT + 1
    likeness = done.result.likeness
    assert likeness is not None
    (row,) = likeness["refused"]
    assert (row["answers"], bool(row["trace_id"])) == (True, True)
    assert done.result.settings["calls"]["planned"] == 2 * COUNT
