"""Prompts asked at a server, so many at once, each answer timed as it streams in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edgedistill.crew import Crew
from edgedistill.errors import EdgedistillError, TeacherError
from edgedistill.teacher import Call, Endpoint, Trace
from edgedistill.teacher.answers import Answer

FAILED_IN_A_ROW = 3  # then nothing more is asked
Stop = EdgedistillError | KeyboardInterrupt


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
    stopped: Stop | None = None

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

    A server that cannot be used any more ends it, and so do three failed calls in a row, and
    Ctrl-C; what was answered until then is kept, and what is in flight has 15 s to come.
    """
    crew, made = _crew(client), Pass(streams, time.perf_counter())
    crew.start(calls.values(), min(streams, len(calls)))
    in_a_row = 0
    for _ in calls:
        try:
            in_a_row = _take(crew.next(), made, in_a_row)
            told()
        except (EdgedistillError, KeyboardInterrupt) as error:
            made.stopped = error
        if in_a_row == FAILED_IN_A_ROW:
            last = list(made.failed.values())[-1].why
            made.stopped = TeacherError(
                f"{FAILED_IN_A_ROW} calls in a row failed, the last: {last}",
                where=client.endpoint.base_url,
            )
        if made.stopped is not None:
            late = crew.stop()
            made.answered |= {s.trace.prompt_id: s for s in late if isinstance(s, Streamed)}
            return made
    return made


def _take(came: Streamed | Trace, made: Pass, in_a_row: int) -> int:
    """Keep what came; how many in a row have failed with it."""
    if isinstance(came, Trace):
        made.failed[came.prompt_id] = came
        return in_a_row + 1
    made.answered[came.trace.prompt_id] = came
    return 0


def _crew(client: Timed) -> Crew[Call, Streamed | Trace]:
    """A call that failed gives its trace alone."""

    def work(call: Call) -> Streamed | Trace:
        trace, answer = client.timed(call)
        ended = time.perf_counter()
        return trace if answer is None else Streamed(trace, answer, ended)

    return Crew(work, client.close)
