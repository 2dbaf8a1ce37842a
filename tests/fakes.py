"""Real classes that stand in for what a unit test cannot have: a teacher over HTTP, and a run that
is killed at a given moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from edgedistill.progress import Silent, SilentTask, Task

MODEL = "fake-teacher"
KEY = "right-key"
TESTS = Path(__file__).resolve().parent
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # of Windows, where it kills as well


class Dying(Silent):
    """A listener whose process is killed when the task `label` has advanced by `amount`."""

    def __init__(self, label: str, amount: float) -> None:
        self._label, self._amount = label, amount

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return _LastTask(self._amount) if label == self._label else SilentTask()


@dataclass
class _LastTask(SilentTask):
    left: float

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.left -= amount
        if self.left <= 0:
            os.kill(os.getpid(), KILL)


def run_dying(file: str, *words: object) -> None:
    """Run a test's file as a program of its own; it must end by a kill."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert abs(done.returncode) == KILL, "the run ended before it could be killed"


@dataclass(frozen=True)
class Received:
    """One request as it came in."""

    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])


@dataclass
class FakeTeacher:
    """A chat-completions server on loopback that misbehaves as told. A context manager.

    `script` maps a prompt (or "*" for any) to what its next requests meet, in order; the last
    entry holds for all later ones when it ends with "!". Without an entry a request is answered
    with `answer(prompt)`. Entries: ok, 429 (Retry-After: `retry_after`), any other HTTP status,
    garbage (no JSON), no-choices, no-content, empty (text ""), refusal, hang, drip (one byte at
    a time), cut (the connection closes in the middle), error-body, quota, no-logprobs (HTTP 400);
    of a stream also unstreamed (a whole answer instead), half (it ends in the middle) and die (so
    does the server).

    `logprobs` is what an answer has where log-probabilities are asked for, by the answer's text.
    """

    script: Mapping[str, Sequence[str]] = field(default_factory=dict)
    answer: Callable[[str], str] = lambda prompt: f"answer to {prompt}"
    delay_seconds: float = 0.0
    retry_after: str = "0"
    usage_in_stream: bool = True
    knows_stream_options: bool = True
    requests: list[Received] = field(default_factory=list)
    logprobs: Callable[[str], Any] = lambda text: None
    together: int = 1  # no request is answered before so many wait
    cached: int = 0  # prompt tokens that usage tells to be from a cache
    most_at_once: int = 0  # requests that were waiting for an answer

    def __post_init__(self) -> None:
        self._plans = {prompt: deque(steps) for prompt, steps in self.script.items()}
        self._lock = threading.Lock()
        self._waiting = 0
        self._barrier = threading.Barrier(self.together)
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"teacher": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        """Requests that came in, retries and refused ones included."""
        return len(self.requests)

    def __enter__(self) -> FakeTeacher:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.released.set()
        self.die()

    def die(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Take as long as a teacher does.

        Raises:
            threading.BrokenBarrierError: for 20 s there were not `together` requests.
        """
        with self._lock:
            self._waiting += 1
            self.most_at_once = max(self.most_at_once, self._waiting)
        time.sleep(self.delay_seconds)
        self._barrier.wait(20)
        with self._lock:
            self._waiting -= 1

    def step(self, received: Received) -> str:
        """What this request meets."""
        with self._lock:
            self.requests.append(received)
            plan = self._plans.get(received.prompt) or self._plans.get("*")
            if not plan:
                return "ok"
            step = plan[0]
            if not step.endswith("!"):
                plan.popleft()
            return step.removesuffix("!")


class _Handler(BaseHTTPRequestHandler):
    teacher: FakeTeacher
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.title(): value for name, value in self.headers.items()}
        received = Received(headers, json.loads(data))
        step = self.teacher.step(received)
        self.teacher.wait()
        try:
            self._meet(step, received)
        except OSError:
            self.close_connection = True  # the client has gone

    def _meet(self, step: str, received: Received) -> None:
        if received.headers.get("Authorization") != f"Bearer {KEY}":
            self._json(401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
        elif self.path != "/v1/chat/completions" or received.body["model"] != MODEL:
            error = {"message": "The model does not exist", "code": "model_not_found"}
            self._json(404, {"error": error})
        elif step.isdigit():
            headers = {"Retry-After": self.teacher.retry_after} if step == "429" else {}
            self._json(int(step), {"error": {"message": f"told to say {step}"}}, headers)
        elif step == "no-logprobs":
            error = {"message": "logprobs is not supported by this model"}
            self._json(400, {"error": error})
        elif step == "quota":
            self._json(429, {"error": {"message": "pay first", "code": "insufficient_quota"}})
        elif step in ("hang", "drip", "cut"):
            self._never_end(step)
        elif step == "garbage":
            self._raw(b"\x00\xff<html>", "application/json")
        elif step == "error-body":
            self._json(200, {"error": {"message": "overloaded"}})
        elif "stream_options" in received.body and not self.teacher.knows_stream_options:
            self._json(400, {"error": {"message": "unknown field stream_options"}})
        elif received.body.get("stream") and step != "unstreamed":
            self._stream(received, step)
        else:
            self._json(200, self._completion(step, received))

    def _completion(self, step: str, received: Received) -> dict[str, Any]:
        content: str | None = self.teacher.answer(received.prompt)
        content = {"empty": "", "no-content": None}.get(step, content)
        message = {"role": "assistant", "content": content}
        if step == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "Unable to help."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if received.body.get("logprobs"):
            choice["logprobs"] = self.teacher.logprobs(content or "")
        choices = [choice]
        return {
            "id": "x",
            "object": "chat.completion",
            "model": f"{MODEL}-2026",
            "choices": [] if step == "no-choices" else choices,
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }

    def _stream(self, received: Received, step: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = self.teacher.answer(received.prompt).split(" ")
        words = [piece if i == 0 else f" {piece}" for i, piece in enumerate(pieces)]
        words = {"empty": [], "half": words[:1], "die": words[:1]}.get(step, words)
        deltas: list[dict[str, Any]] = [{"role": "assistant"}, *({"content": w} for w in words)]
        for delta in deltas:
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            self.wfile.write(b": ping\n\n")
        self.close_connection = True
        if step == "die":
            self.teacher.die()
        if step in ("half", "die"):
            return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.teacher.usage_in_stream:
            usage: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": 30}
            usage["prompt_tokens_details"] = {"cached_tokens": self.teacher.cached}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, values: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps({"model": MODEL, **values}).encode() + b"\r\n\r\n")

    def _never_end(self, step: str) -> None:
        if step != "hang":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
        while step == "drip" and not self.teacher.released.wait(0.05):
            self.wfile.write(b" ")
        if step == "hang":
            self.teacher.released.wait(60)
        self.close_connection = True

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        self._raw(json.dumps(body).encode(), "application/json", status, headers)

    def _raw(
        self, data: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
