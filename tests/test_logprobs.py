"""Log-probabilities from what a teacher sends to what a trace keeps and what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.artifacts import TokenMixEntry
from edgedistill.collect import collect
from edgedistill.errors import TeacherRefused
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, CollectSpec
from edgedistill.spelling import STOP, Said
from edgedistill.teacher import call_for, prompt_version
from edgedistill.teacher.client import Endpoint, TeacherClient, Trace
from edgedistill.teacher.logprobs import Unreadable, compact, read_said
from edgedistill.tokenmix import TokenMix

ENTRY = TokenMixEntry("a", ({"role": "user", "content": "hi"},))
# Of this teacher and prompt before there was top_logprobs: stores and stages must be found again.
KEY_BEFORE = "f86071709c11cf31f8fa32baeab20e0482664ab9c53f394ca9413ae996bf11cd"
VERSION_BEFORE = "49ed9b36740d"


def api(base_url: str = "http://127.0.0.1:9/v1", model: str = "m", **sampling: Any) -> ApiTeacher:
    return ApiTeacher.model_validate(
        {"kind": "api", "base_url": base_url, "model": model, "licence": "x", "system": "s",
         "sampling": sampling, "api_key_env": "TEST_TEACHER_KEY"}
    )  # fmt: skip


def token(text: str, logprob: Any = -0.5, spelled: Any = "utf-8", **more: Any) -> dict[str, Any]:
    data = list(text.encode()) if spelled == "utf-8" else spelled
    return {"token": text, "bytes": data, "logprob": logprob, **more}


def sent(*tokens: Any) -> dict[str, Any]:
    return {"content": list(tokens)}


def words(text: str) -> dict[str, Any]:
    listed = [token("x", -2.0), token("", -3.0)]
    parts = text.replace(" ", "| ").split("|")
    return sent(*(token(p, top_logprobs=[token(p), *listed]) for p in parts))


def test_what_is_not_asked_for_changes_no_digest() -> None:
    call = call_for(ENTRY, api())
    assert (call.key, prompt_version(api())) == (KEY_BEFORE, VERSION_BEFORE)
    assert call.parameters == {"temperature": 0.0, "max_tokens": 256}
    assert api().sampling.model_dump(mode="json") == {
        "temperature": 0.0, "max_tokens": 256, "seed": None
    }  # fmt: skip
    assert api(top_logprobs=0).sampling.model_dump(mode="json")["top_logprobs"] == 0


@pytest.mark.parametrize(
    ("purpose", "asked"), [("collect", {"logprobs": True, "top_logprobs": 5}), ("bench-1", {})]
)
def test_only_what_is_learnt_from_asks_for_them(purpose: str, asked: dict[str, Any]) -> None:
    call = call_for(ENTRY, api(top_logprobs=5), purpose)
    assert call.parameters == {"temperature": 0.0, "max_tokens": 256, **asked}
    assert call.prompt_version == VERSION_BEFORE


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ([], None),
        ({"content": None}, None),
        (sent(), []),
        # the token itself is not among the alternatives, another that spells the same is
        (
            sent(token("a", -1, top_logprobs=[token("b", -2), token("a", -1), token("a", -9)])),
            [["a", -1.0, [["b", -2.0], ["a", -9.0]]]],
        ),
        # half a character; what stands for one that was lost; a special token among exact ones
        (sent(token("\\xf0", spelled=[0xF0])), [[[0xF0], -0.5, []]]),
        (sent(token("x\ufffd")), [[None, -0.5, []]]),
        (sent(token("a"), token("<|end|>", spelled=None)), [["a", -0.5, []], [None, -0.5, []]]),
        # a teacher that has no bytes at all; bytes that are none; half of a surrogate pair
        (sent(token("é", spelled=None)), [["é", -0.5, []]]),
        (sent(token("é", spelled=[999])), [[None, -0.5, []]]),
        (sent(token("\ud83d", spelled=None)), [[None, -0.5, []]]),
        (sent({"token": "a", "logprob": -1, "top_logprobs": None}), [["a", -1.0, []]]),
        # rounding above 0, and what is too unlikely to tell
        (sent(token("a", 1e-5, top_logprobs=[token("b", -1e9)])), [["a", 0.0, [["b", -9999.0]]]]),
        (sent(token("a", float("-inf"))), [["a", -9999.0, []]]),
    ],
)  # fmt: skip
def test_what_a_trace_keeps(given: Any, kept: Any) -> None:
    assert compact(given) == kept


@pytest.mark.parametrize(
    "entry",
    ["a", {}, token("a", "x"), token("a", True), token("a", 0.5), token("a", float("nan")),
     token("a", None), {"token": 3, "logprob": -1}, token("a", top_logprobs={}),
     token("a", top_logprobs=["b"]), token("a", top_logprobs=[{"token": "b"}])],
)  # fmt: skip
def test_what_are_no_log_probabilities(entry: Any) -> None:
    with pytest.raises(Unreadable):
        compact(sent(entry))


def test_what_was_kept_is_read_as_bytes() -> None:
    kept = [["é", -0.5, [[[0xF0], -1.0], [None, -2.0]]], ["", -0.1, []]]
    assert read_said(json.loads(json.dumps(kept))) == [
        Said("é".encode(), -0.5, ((b"\xf0", -1.0), (None, -2.0))),
        Said(STOP, -0.1),
    ]


def ask(teacher: FakeTeacher, *prompts: str) -> list[Trace]:
    with TeacherClient(Endpoint(teacher.base_url, KEY), attempts=2, backoff_seconds=0.01) as client:
        entries = [TokenMixEntry(p, ({"role": "user", "content": p},)) for p in prompts]
        asked = api(teacher.base_url, MODEL, top_logprobs=2)
        return [client.ask(call_for(entry, asked)) for entry in entries]


def test_a_trace_keeps_them() -> None:
    with FakeTeacher(logprobs=words) as teacher:
        (trace,) = ask(teacher, "x")
    assert trace.failure is None
    assert trace.top_logprobs == [
        [word, -0.5, [["x", -2.0], ["", -3.0]]] for word in ("answer", " to")
    ] + [[" x", -0.5, [["x", -2.0], ["", -3.0]]]]
    assert teacher.requests[0].body["top_logprobs"] == 2


@pytest.mark.parametrize(
    ("script", "logprobs", "said"),
    [
        ({}, None, "came without them"),
        ({}, sent(), "came without them"),
        ({}, sent("x"), "cannot be read"),
        ({"*": ["no-logprobs!"]}, None, "not supported by this model"),
    ],
)
def test_a_teacher_without_them_is_refused_at_once(
    script: dict[str, list[str]], logprobs: Any, said: str
) -> None:
    with FakeTeacher(script, logprobs=lambda text: logprobs) as teacher:
        with pytest.raises(TeacherRefused, match=rf"{said}[\s\S]*top_logprobs"):
            ask(teacher, "x")
        assert teacher.calls == 1


def test_a_later_answer_without_them_is_a_failed_call() -> None:
    def only_once(text: str) -> Any:
        return words(text) if text.endswith("x") else None

    with FakeTeacher(logprobs=only_once) as teacher:
        first, second = ask(teacher, "x", "y")
    assert first.failure is None
    assert second.failure == "answer without log-probabilities"
    assert teacher.calls == 2


def test_an_answer_that_nobody_learns_from_needs_none() -> None:
    with FakeTeacher({"x": ["empty"], "y": ["refusal"]}) as teacher:
        assert [trace.failure for trace in ask(teacher, "x", "y")] == [None, None]


def test_they_are_part_of_what_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    mix = TokenMix((ENTRY,), "unused")
    digests = []
    for number, logprobs in enumerate((words, lambda text: sent(token(text)))):
        with FakeTeacher(logprobs=logprobs) as teacher:
            asked = api(teacher.base_url, MODEL, top_logprobs=2)
            out = tmp_path / str(number)
            traces = collect(mix, asked, CollectSpec(), out, Silent())
        digests.append(traces.digest)
        (line,) = traces.file.read_text("utf-8").splitlines()
        assert json.loads(line)["top_logprobs"][0][0].startswith("answer")
    assert digests[0] != digests[1]
