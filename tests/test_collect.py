"""Collect: nothing is asked twice, whatever ends a run, and failures follow the recipe's rule."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.artifacts import TokenMixEntry, Traces
from edgedistill.asking import STORE
from edgedistill.collect import collect
from edgedistill.errors import CollectError, StorageError, TeacherRefused, TeacherUnreachable
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, CollectSpec
from edgedistill.teacher import TraceStore, call_for
from edgedistill.tokenmix import TokenMix

SPEC = CollectSpec(
    concurrency=2, timeout_seconds=5, attempts=2, backoff_seconds=0.01, max_failed_share=0.5
)

BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_collect import SPEC, api, mix
from edgedistill.collect import collect
from edgedistill.progress import Silent
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
collect(mix({prompts!r}), api({url!r}), SPEC, Path({out!r}), Silent())
"""


@dataclass
class Notes(Silent):
    """Keeps what a stage noted."""

    texts: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)


def entry(prompt: str, name: str | None = None) -> TokenMixEntry:
    return TokenMixEntry(name or f"id-{prompt}", ({"role": "user", "content": prompt},))


def mix(prompts: Sequence[str]) -> TokenMix:
    return TokenMix(tuple(entry(prompt) for prompt in prompts), "unused")


def api(base_url: str, **changes: Any) -> ApiTeacher:
    values = {"kind": "api", "model": MODEL, "licence": "x", "api_key_env": "TEST_TEACHER_KEY"}
    return ApiTeacher.model_validate({**values, "base_url": base_url, **changes})


def run(teacher: FakeTeacher, prompts: Sequence[str], out: Path, **changes: Any) -> Traces:
    spec = SPEC.model_copy(update=changes)
    return collect(mix(prompts), api(teacher.base_url), spec, out, Silent())


def rows(traces: Traces) -> list[dict[str, Any]]:
    return [json.loads(line) for line in traces.file.read_text("utf-8").split("\n") if line]


def test_one_trace_a_prompt_in_order(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        traces = run(teacher, "abcde", tmp_path, concurrency=5)
    assert [row["prompt_id"] for row in rows(traces)] == [f"id-{x}" for x in "abcde"]
    assert [row["text"] for row in rows(traces)] == [f"answer to {x}" for x in "abcde"]
    assert (traces.answered, traces.failed) == (5, 0)


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        first = run(teacher, "abc", tmp_path)
        url = teacher.base_url
    # The server is gone: opening the endpoint would fail.
    again = collect(mix("abc"), api(url), SPEC, tmp_path, Silent())
    fewer = collect(mix("ca"), api(url), SPEC, tmp_path, Silent())
    assert (again, teacher.calls) == (first, 3)
    assert [row["text"] for row in rows(fewer)] == ["answer to c", "answer to a"]


def test_a_changed_prompt_costs_one_call(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        run(teacher, "abc", tmp_path)
        traces = run(teacher, "abX", tmp_path)
    assert (teacher.calls, traces.answered) == (4, 3)


def test_the_same_text_is_asked_once(tmp_path: Path) -> None:
    twice = TokenMix((entry("a", "one"), entry("b"), entry("a", "two")), "unused")
    with FakeTeacher() as teacher:
        traces = collect(twice, api(teacher.base_url), SPEC, tmp_path, Silent())
    assert teacher.calls == 2
    assert [row["prompt_id"] for row in rows(traces)] == ["one", "id-b", "two"]


@pytest.mark.parametrize(
    ("changes", "reused"),
    [({"concurrency": 7}, True), ({"timeout_seconds": 9}, True), ({"attempts": 3}, True)],
)
def test_speed_is_no_part_of_the_identity(
    tmp_path: Path, changes: dict[str, Any], reused: bool
) -> None:
    with FakeTeacher() as teacher:
        one, two = run(teacher, "ab", tmp_path), run(teacher, "ab", tmp_path, **changes)
    assert (one.folder == two.folder) == reused


def test_equal_answers_give_equal_digests(tmp_path: Path) -> None:
    digests: list[str] = []
    for fake in (FakeTeacher(), FakeTeacher(delay_seconds=0.05), FakeTeacher(answer=str.upper)):
        with fake as teacher:
            digests.append(run(teacher, "ab", tmp_path / str(len(digests))).digest)
    assert digests[0] == digests[1] != digests[2]


def test_failures_are_recorded_noted_and_not_asked_again(tmp_path: Path) -> None:
    notes = Notes()
    with FakeTeacher({"b": ["500!"]}) as teacher:
        first = collect(mix("abc"), api(teacher.base_url), SPEC, tmp_path, notes)
        calls = teacher.calls
        run(teacher, "abc", tmp_path)
        run(teacher, "abcd", tmp_path)
    assert (first.answered, first.failed, calls) == (2, 1, 4)
    assert rows(first)[1]["failure"] == "HTTP 500 (server error)"
    assert any("1 of 3 calls failed (HTTP 500 (server error): 1)" in text for text in notes.texts)
    assert teacher.calls == calls + 1  # only the new prompt


def test_retry_failed_asks_only_the_failed(tmp_path: Path) -> None:
    with FakeTeacher({"b": ["500", "500"]}) as teacher:
        first = run(teacher, "abc", tmp_path)
        spec, asked = api(teacher.base_url), teacher.calls
        again = collect(mix("abc"), spec, SPEC, tmp_path, Silent(), retry_failed=True)
    assert (first.failed, again.failed, teacher.calls) == (1, 0, asked + 1)
    assert again.digest != first.digest


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"on_failure": "stop"}, "1 of 4 calls failed.*on_failure: stop"),
        ({"max_failed_share": 0.2}, "1 of 4 calls failed.*max_failed_share of 0.2"),
    ],
)
def test_rules(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with FakeTeacher({"b": ["garbage!"]}) as teacher:
        with pytest.raises(CollectError, match=part):
            run(teacher, "abcd", tmp_path, concurrency=1, **changes)
        assert teacher.calls == 3  # a, and b twice: c and d were not asked
        with pytest.raises(CollectError, match="`build` or `collect` with --retry-failed"):
            run(teacher, "abcd", tmp_path, **changes)
        assert teacher.calls == 3
        assert run(teacher, "abcd", tmp_path).failed == 1
        with pytest.raises(CollectError, match=part):  # complete, and still too bad for this rule
            run(teacher, "abcd", tmp_path, **changes)


def test_refused_and_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTeacher() as teacher:
        monkeypatch.setenv("TEST_TEACHER_KEY", "wrong")
        with pytest.raises(TeacherRefused, match="TEST_TEACHER_KEY"):
            run(teacher, "abcdefgh", tmp_path)
        assert teacher.calls <= SPEC.concurrency
    with pytest.raises(TeacherUnreachable, match=teacher.base_url):
        run(teacher, "ab", tmp_path)


def test_prompts_with_one_prefix_follow_each_other(tmp_path: Path) -> None:
    def talk(start: str, end: str) -> TokenMixEntry:
        before = ({"role": "user", "content": start}, {"role": "assistant", "content": "ok"})
        return TokenMixEntry(end, (*before, {"role": "user", "content": end}))

    entries = (talk("x", "1"), talk("y", "2"), talk("x", "3"), talk("y", "4"))
    spec = SPEC.model_copy(update={"concurrency": 1})
    with FakeTeacher() as teacher:
        traces = collect(TokenMix(entries, "-"), api(teacher.base_url), spec, tmp_path, Silent())
    assert [request.prompt for request in teacher.requests] == ["1", "3", "2", "4"]
    assert [row["prompt_id"] for row in rows(traces)] == ["1", "2", "3", "4"]


def test_calls_overlap_up_to_the_bound(tmp_path: Path) -> None:
    with FakeTeacher(together=4) as teacher:
        run(teacher, "abcdefgh", tmp_path, concurrency=4)
    assert teacher.calls == 8


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / STORE).mkdir(parents=True)
    with FakeTeacher() as teacher, pytest.raises(StorageError, match=STORE):
        run(teacher, "a", tmp_path)
    assert teacher.calls == 0


def _start(teacher: FakeTeacher, prompts: str, out: Path) -> subprocess.Popen[bytes]:
    tests = str(Path(__file__).parent)
    code = BUILD.format(tests=tests, prompts=prompts, url=teacher.base_url, out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(Path(tests).parent)}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)


def _wait_for_calls(teacher: FakeTeacher, count: int) -> None:
    deadline = time.monotonic() + 30
    while teacher.calls < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert teacher.calls >= count


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX signal")
def test_killed_then_finished_without_asking_twice(tmp_path: Path) -> None:
    prompts = "abcdefghijklmnop"
    with FakeTeacher() as calm:
        expected = run(calm, prompts, tmp_path / "calm").digest
    with FakeTeacher(delay_seconds=0.05) as teacher:
        child = _start(teacher, prompts, tmp_path / "killed")
        _wait_for_calls(teacher, 7)
        child.kill()
        child.communicate()
        traces = run(teacher, prompts, tmp_path / "killed")
    assert traces.digest == expected
    assert teacher.calls <= len(prompts) + SPEC.concurrency  # only what was in flight


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_answers_in_flight(tmp_path: Path) -> None:
    prompts = "abcdefgh"
    with FakeTeacher(delay_seconds=0.5) as teacher:
        child = _start(teacher, prompts, tmp_path)
        _wait_for_calls(teacher, 4)  # a and b answered, c and d in flight
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
        assert said.rstrip().endswith(b"KeyboardInterrupt")
        asked = teacher.calls
        with TraceStore(tmp_path / STORE) as store:
            kept = [store.get(call_for(entry(p), api(teacher.base_url)).key) for p in prompts]
        assert [trace is not None for trace in kept] == [n < asked for n in range(8)]
        run(teacher, prompts, tmp_path)
    assert asked in (4, 5)
    assert teacher.calls == len(prompts)


def test_prompt_version_is_only_a_name(tmp_path: Path) -> None:
    with FakeTeacher() as teacher:
        run(teacher, "a", tmp_path)
        named = api(teacher.base_url, prompt_version="v7")
        traces = collect(mix("a"), named, SPEC, tmp_path, Silent())
    assert teacher.calls == 1
    assert rows(traces)[0]["prompt_version"] == "v7"
    assert replace(traces, failed=0) == traces
