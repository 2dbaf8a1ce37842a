"""The teacher boundary against a real HTTP server on loopback."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.artifacts import TokenMixEntry
from edgedistill.errors import (
    RuntimeFailure,
    TeacherError,
    TeacherRefused,
    TeacherUnreachable,
    WeightsError,
)
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, LocalTeacher
from edgedistill.teacher import call_for, open_endpoint
from edgedistill.teacher.answers import Trouble
from edgedistill.teacher.client import Call, Endpoint, TeacherClient
from edgedistill.teacher.local_answers import Usage, batch_ends, bundles, reusable
from edgedistill.teacher.local_server import Server, serve
from edgedistill.teacher.refusals import TEACHER, Asked, unreachable


def call(prompt: str = "hello", model: str = MODEL) -> Call:
    message = {"role": "user", "content": prompt}
    return Call("p1", model, (message,), {"temperature": 0.0, "max_tokens": 9}, "v1")


def client(
    teacher: FakeTeacher, key: str = KEY, attempts: int = 3, timeout_seconds: float = 30
) -> TeacherClient:
    """Patient, as a busy machine is slow: only who waits for the timeout shortens it."""
    endpoint = Endpoint(teacher.base_url, key, "TEACHER_KEY")
    return TeacherClient(endpoint, timeout_seconds, attempts=attempts, backoff_seconds=0.01)


def api(**changes: object) -> ApiTeacher:
    values = {"kind": "api", "base_url": "http://127.0.0.1:9/v1", "model": MODEL, "licence": "x"}
    return ApiTeacher.model_validate({**values, **changes})


def test_trace_records_provenance() -> None:
    with FakeTeacher() as teacher, client(teacher) as asked:
        trace = asked.ask(call())
    assert (trace.model_asked, trace.model_answered) == (MODEL, f"{MODEL}-2026")
    assert (trace.text, trace.finish_reason, trace.failure) == ("answer to hello", "stop", None)
    assert (trace.prompt_tokens, trace.completion_tokens, trace.attempts) == (7, 3, 1)
    assert trace.prompt_version == "v1"
    assert trace.parameters == {"temperature": 0.0, "max_tokens": 9}
    assert trace.latency_seconds > 0
    assert teacher.requests[0].headers["X-Trace-Id"] == trace.trace_id
    assert teacher.requests[0].body["max_tokens"] == 9


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("429", "HTTP 429 (rate limit)"),
        ("500", "HTTP 500 (server error)"),
        ("garbage", "answer that is not JSON"),
        ("no-choices", "answer without choices"),
        ("no-content", "answer without content"),
        ("error-body", "error inside the answer"),
        ("hang", "no answer in time"),
        ("drip", "no answer in time"),
        ("cut", "connection lost"),
    ],
)
def test_trouble_is_retried_then_recorded(step: str, reason: str) -> None:
    script = {"heals": [step], "stays": [step, step]}
    timeout = 0.5 if step in ("hang", "drip") else 30
    with (
        FakeTeacher(script) as teacher,
        client(teacher, attempts=2, timeout_seconds=timeout) as asked,
    ):
        healed, failed = asked.ask(call("heals")), asked.ask(call("stays"))
    assert (healed.text, healed.failure, healed.attempts) == ("answer to heals", None, 2)
    assert (failed.text, failed.failure, failed.attempts) == ("", reason, 2)
    assert [r.headers["X-Attempt"] for r in teacher.requests] == ["1", "2", "1", "2"]


def test_why_a_call_failed_is_kept() -> None:
    with FakeTeacher({"bad": ["400"]}) as teacher, client(teacher) as asked:
        failed, answered = asked.ask(call("bad")), asked.ask(call("good"))
    assert "told to say 400" in failed.failure_detail
    assert answered.failure_detail == ""


def test_a_refusal_says_so() -> None:
    with FakeTeacher({"bad": ["refusal"]}) as teacher, client(teacher) as asked:
        trace = asked.ask(call("bad"))
    assert (trace.text, trace.finish_reason) == ("Unable to help.", "refusal")


def test_a_server_without_stream_options_is_streamed_all_the_same() -> None:
    with FakeTeacher(knows_stream_options=False) as teacher, client(teacher) as asked:
        traces = [asked.stream(call(prompt)) for prompt in ("a b", "c")]
    assert [trace.text for trace in traces] == ["answer to a b", "answer to c"]
    assert [(trace.failure, trace.attempts) for trace in traces] == [(None, 1)] * 2
    assert teacher.calls == 3  # the refusal takes time, so the option is not offered again


def test_bad_request_is_not_retried() -> None:
    with FakeTeacher({"*": ["400!"]}) as teacher, client(teacher) as asked:
        trace = asked.ask(call())
    assert (trace.failure, trace.attempts, teacher.calls) == ("HTTP 400 (refused)", 1, 1)


def test_retry_after_is_honoured() -> None:
    with FakeTeacher({"*": ["429"]}, retry_after="0.4") as teacher, client(teacher) as asked:
        started = time.monotonic()
        assert asked.ask(call()).failure is None
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("step", ["hang!", "drip!"])
def test_a_hanging_teacher_is_left_within_bounds(step: str) -> None:
    fake = FakeTeacher({"*": [step]})
    with fake as teacher, client(teacher, attempts=2, timeout_seconds=0.3) as asked:
        started = time.monotonic()
        assert asked.ask(call()).failure == "no answer in time"
    assert 0.6 <= time.monotonic() - started < 20


def test_close_ends_a_long_pause() -> None:
    with FakeTeacher({"*": ["429!"]}, retry_after="50") as teacher, client(teacher) as asked:
        threading.Timer(0.2, asked.close).start()
        started = time.monotonic()
        assert asked.ask(call()).failure is not None
    assert time.monotonic() - started < 25


@pytest.mark.parametrize(
    ("key", "model", "steps", "parts"),
    [
        ("wrong", MODEL, [], ["401", "TEACHER_KEY"]),
        (KEY, "other", [], ["404", "'other'", "teacher.model"]),
        (KEY, MODEL, ["403!"], ["403", "TEACHER_KEY"]),
        (KEY, MODEL, ["quota!"], ["no quota", "TEACHER_KEY"]),
    ],
)
def test_refusals_for_good(key: str, model: str, steps: list[str], parts: list[str]) -> None:
    with (
        FakeTeacher({"*": steps}) as teacher,
        client(teacher, key) as asked,
        pytest.raises(TeacherRefused) as caught,
    ):
        asked.ask(call(model=model))
    assert all(part in str(caught.value) for part in [*parts, teacher.base_url])
    assert teacher.calls == 1


def test_a_later_403_is_about_one_prompt() -> None:
    with FakeTeacher({"bad": ["403!"]}) as teacher, client(teacher) as asked:
        asked.ask(call("good"))
        assert asked.ask(call("bad")).failure == "HTTP 403 (refused)"


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        asked = TeacherClient(Endpoint(url, ""), 1, 2, 0.01)
        with asked, pytest.raises(TeacherUnreachable, match=url) as raised:
            asked.ask(call())
    assert "kept" not in str(raised.value)  # nothing was answered


@pytest.mark.parametrize("first", [True, False])
def test_answers_are_kept_where_there_are_any(first: bool) -> None:
    at = Asked("http://here/v1", None, TEACHER, first=first)
    said = str(unreachable(Trouble("refused"), 2, at))
    assert ("Answers so far are kept" in said) is not first


@pytest.mark.parametrize(("usage", "tokens"), [(True, 30), (False, 3)])
def test_stream(usage: bool, tokens: int) -> None:
    fake = FakeTeacher(usage_in_stream=usage, delay_seconds=0.05)
    with fake as teacher, client(teacher) as asked:
        trace = asked.stream(call())
    assert (trace.text, trace.finish_reason) == ("answer to hello", "stop")
    assert trace.completion_tokens == tokens
    assert trace.time_to_first_token is not None
    assert 0.05 <= trace.time_to_first_token <= trace.latency_seconds


@pytest.mark.parametrize("usage", [True, False])
def test_each_part_of_a_stream_is_timed(usage: bool) -> None:
    fake = FakeTeacher(usage_in_stream=usage, delay_seconds=0.05, cached=4)
    with fake as teacher, client(teacher) as asked:
        trace, answer = asked.timed(call())
    assert answer is not None
    assert len(answer.chunk_seconds) == 3  # "answer", " to", " hello"
    assert 0.05 <= answer.chunk_seconds[0] <= answer.chunk_seconds[-1] <= answer.total_seconds
    assert answer.total_seconds <= trace.latency_seconds + 1e-6  # which is rounded
    assert trace.time_to_first_token == answer.chunk_seconds[0]
    assert (answer.counted, answer.cached_tokens) == (usage, 4 if usage else 0)


def test_a_call_that_failed_has_no_times() -> None:
    with FakeTeacher({"*": ["400!"]}) as teacher, client(teacher) as asked:
        trace, answer = asked.timed(call())
    assert (trace.failure, answer) == ("HTTP 400 (refused)", None)


def test_stream_that_is_cut_is_retried() -> None:
    with FakeTeacher({"*": ["cut"]}) as teacher, client(teacher) as asked:
        assert asked.stream(call()).attempts == 2


def test_a_proxy_in_the_environment_does_not_see_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with FakeTeacher() as teacher, client(teacher) as asked:
        assert asked.ask(call()).failure is None


def test_key_is_never_shown() -> None:
    assert "sesame" not in repr(Endpoint("http://x/v1", "sesame"))


@pytest.mark.parametrize(("value", "part"), [(None, "is not set"), ("k\u00e9y", "no HTTP header")])
def test_key_variable(monkeypatch: pytest.MonkeyPatch, value: str | None, part: str) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    opened = open_endpoint(api(api_key_env="A_KEY"), Silent())
    with pytest.raises(TeacherRefused, match=f"A_KEY.*{part}"), opened:
        pass


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " sesame\n")
    with open_endpoint(api(api_key_env="A_KEY"), Silent()) as endpoint:
        assert (endpoint.api_key, endpoint.key_env) == ("sesame", "A_KEY")


def test_call_for_puts_the_system_prompt_first() -> None:
    entry = TokenMixEntry("a", ({"role": "user", "content": "hi"},))
    made = call_for(entry, api(system="be short"))
    assert [m["content"] for m in made.messages] == ["be short", "hi"]
    own = TokenMixEntry("b", ({"role": "system", "content": "own"}, *entry.messages))
    assert [m["content"] for m in call_for(own, api(system="x")).messages] == ["own", "hi"]


@pytest.mark.parametrize(
    ("changes", "same_key", "same_version"),
    [
        ({"licence": "other"}, True, True),
        ({"base_url": "http://moved/v1"}, True, True),
        ({"prompt_version": "mine"}, True, False),
        ({"system": "other"}, False, False),
        ({"sampling": {"temperature": 0.5}}, False, False),
        ({"model": "other"}, False, True),
    ],
)
def test_what_names_a_request(
    changes: dict[str, object], same_key: bool, same_version: bool
) -> None:
    entry = TokenMixEntry("a", ({"role": "user", "content": "hi"},))
    one, two = call_for(entry, api()), call_for(entry, api(**changes))
    assert (one.key == two.key) == same_key
    assert (one.prompt_version == two.prompt_version) == same_version
    assert call_for(entry, api(), purpose="bench").key != one.key


def local(weights: str) -> LocalTeacher:
    return LocalTeacher(kind="local", model="m", licence="x", weights=weights)


def test_local_weights_are_part_of_a_request(tmp_path: Path) -> None:
    entry = TokenMixEntry("a", ({"role": "user", "content": "hi"},))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    keys = [call_for(entry, local(str(file))).key, call_for(entry, local("pinned-name")).key]
    file.write_bytes(b"other")
    keys.append(call_for(entry, local(str(file))).key)
    assert len(set(keys)) == 3
    with pytest.raises(WeightsError, match=r"gone\.gguf"):
        call_for(entry, local(str(tmp_path / "gone.gguf")))


def served_by(model: Path, port: int | None) -> AbstractContextManager[Server]:
    return serve(model, "m", threads=1, context_tokens=128, port=port, start_seconds=60)


def test_a_port_in_use_is_found_before_loading() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        served = served_by(Path("none.gguf"), port)
        with pytest.raises(TeacherError, match=rf"port {port}[\s\S]*teacher\.port"), served:
            pass


def test_a_server_that_dies_says_its_last_lines(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    died = r"(?s)broken\.gguf.*died.*Failed to load model"
    with pytest.raises(RuntimeFailure, match=died), served_by(broken, None):
        pass


def test_the_server_leaves_with_its_parent() -> None:
    module = "edgedistill.teacher.local_server"
    child = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(b'{"model": "none"')  # a parent that was killed in the middle of a line
    child.stdin.close()
    assert child.wait(20) is not None


@pytest.mark.parametrize(
    ("parts", "ends"),
    [
        # 0 is a control token, another number that many plain tokens
        ([0, 480, 0, 1, 0, 30, 0, 1, 0, 2], [484, 519]),
        ([0, 900, 0, 0, 2, 0, 12, 0, 1], [512, 906, 920]),
        ([0, 10, 0, 80, 0, 2], [12, 28, 44, 60, 76, 92, 95]),
        ([40], [40]),
        ([0, 3], [4]),
    ],
)
def test_batches_end_where_the_last_text_starts(parts: list[int], ends: list[int]) -> None:
    control = [is_control for part in parts for is_control in ([False] * part or [True])]
    assert batch_ends(control) == ends


def chunk(text: str | None = None, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "c1", "choices": [choice]}


@pytest.mark.parametrize(
    ("seconds", "sent"), [(60.0, [None, "S", "ELECT"]), (0.0, [None, *"SELECT", None])]
)
def test_text_after_the_first_token_travels_together(
    seconds: float, sent: list[str | None]
) -> None:
    pieces = [chunk(), *map(chunk, "SELECT"), chunk(finish_reason="stop")]
    with ThreadPoolExecutor(1) as engine:
        made = list(bundles(engine, iter(pieces), Usage(20, 7), seconds))
    choices = [item["choices"][0] for item in made]
    assert [choice["delta"].get("content") for choice in choices] == sent
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(sent) - 1) + ["stop"]
    wanted = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
    assert made[-1]["usage"] == wanted


def test_reuse_never_changes_the_company_of_a_token() -> None:
    """Cached or not, each token is evaluated in the batch that its prompt alone determines."""
    chance = random.Random(0)
    cached: list[int] = []
    before: list[int] = []
    company: list[tuple[int, int]] = []
    reused = 0
    for _ in range(400):
        system, text = chance.choice([40, 600]), chance.choice([3, 20, 90])
        start = [1, *[7] * system, 1, 8, *[7] * chance.randrange(text)]
        tokens = [*start, *(chance.randrange(5, 9) for _ in range(text)), 1, 9]
        ends = batch_ends([token == 1 for token in tokens])
        kept = reusable(cached, before, tokens, ends)
        alone = [(a, b) for a, b in zip([0, *ends], ends, strict=False) for _ in range(a, b)]
        company = company[:kept] + alone[kept:]
        assert company == alone
        assert tokens[:kept] == cached[:kept]
        reused += kept
        evaluated = chance.choice([len(tokens), len(tokens), kept])  # a client may leave early
        cached, before = [*tokens[:evaluated], *([7] * 4 if evaluated > kept else [])], ends
    assert reused > 10_000
