"""Prompts asked at a server, so many at once, each answer timed as it streams in."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edgedistill.errors import EdgedistillError, TeacherError
from edgedistill.teacher import Call, Endpoint, Trace
from edgedistill.teacher.answers import Answer

POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0
FAILED_IN_A_ROW = 3  # then nothing more is asked


class Timed(Protocol):
    """The part of a TeacherClient that is used here."""

    endpoint: Endpoint

    def timed(self, call: Call) -> tuple[Trace, Answer | None]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Streamed:
    """One answer with its provenance; `ended` by time.perf_counter."""

    trace: Trace
    answer: Answer
    ended: float

    @property
    def per_token_seconds(self) -> float | None:
        """Mean seconds a token behind the first; None where the server does not count tokens, or
        where there is one chunk only."""
        came, tokens = self.answer.chunk_seconds, self.answer.completion_tokens
        if not self.answer.counted or len(came) < 2 or tokens < 2:
            return None
        return (came[-1] - came[0]) / (tokens - 1)


@dataclass
class Pass:
    """All prompts asked once, `streams` at a time. `answered` and `failed` (traces) go by prompt
    ID; `stopped` is why the rest was not asked."""

    streams: int
    begun: float
    answered: dict[str, Streamed] = field(default_factory=dict)
    failed: dict[str, Trace] = field(default_factory=dict)
    stopped: EdgedistillError | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens of the answers, from the first request to the end of the last answer; None
        where the server does not count them."""
        each = self.answered.values()
        if not each or not all(one.answer.counted for one in each):
            return None
        seconds = max(one.ended for one in each) - self.begun
        return sum(one.answer.completion_tokens for one in each) / seconds


def ask_all(
    client: Timed, calls: Mapping[str, Call], streams: int, told: Callable[[], None]
) -> Pass:
    """Ask calls (by prompt ID) in their order, `streams` in flight; `told` is called for each.

    A server that cannot be used any more ends it, and so do three failed calls in a row; what was
    answered until then is kept, and what is in flight has 15 s to come.
    """
    crew = _Crew(client, calls)
    made = Pass(streams, time.perf_counter())
    crew.start(min(streams, len(calls)))
    in_a_row = 0
    for _ in calls:
        came = crew.next()
        if isinstance(came, Trace):
            made.failed[came.prompt_id] = came
            in_a_row += 1
        elif isinstance(came, Streamed):
            made.answered[came.trace.prompt_id] = came
            in_a_row = 0
        else:
            made.stopped = came
        if in_a_row == FAILED_IN_A_ROW:
            last = reason(list(made.failed.values())[-1])
            made.stopped = TeacherError(
                f"{FAILED_IN_A_ROW} calls in a row failed, the last: {last}",
                where=client.endpoint.base_url,
            )
        if made.stopped is not None:
            for late in crew.stop():
                made.answered[late.trace.prompt_id] = late
            return made
        told()
    return made


def reason(trace: Trace) -> str:
    """Why a call failed, with what the server said."""
    return ": ".join(filter(None, (trace.failure, trace.failure_detail)))


Came = Streamed | Trace | EdgedistillError


class _Crew:
    """Threads that take calls from one queue."""

    def __init__(self, client: Timed, calls: Mapping[str, Call]) -> None:
        self._client = client
        self._todo: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Came | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        for call in calls.values():
            self._todo.put(call)

    def start(self, count: int) -> None:
        # Daemons: a call that hangs must not keep a command alive that was told to end.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def next(self) -> Came:
        while True:
            try:
                # With a timeout, since Windows does not let Ctrl-C through an endless wait.
                came = self._done.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(came, Streamed | Trace | EdgedistillError):
                return came
            raise came

    def stop(self) -> list[Streamed]:
        """Start no other call; the answers of those in flight."""
        self._stop.set()
        self._client.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = []
        while not self._done.empty():
            late.append(self._done.get_nowait())
        return [one for one in late if isinstance(one, Streamed)]

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                trace, answer = self._client.timed(self._todo.get_nowait())
                ended = time.perf_counter()
                self._done.put(trace if answer is None else Streamed(trace, answer, ended))
        except queue.Empty:
            return
        except BaseException as error:
            self._done.put(error)
