"""How long answers take: teacher and student the same way, over HTTP, streaming, in turn.

Warm and cold are apart: every server has answered one other prompt before the first that counts,
and the time from its start to that first answer is given on its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from edgedistill.errors import TeacherError
from edgedistill.fidelity import EvalRow, shuffled
from edgedistill.progress import Progress
from edgedistill.results import Latency, LlamaBench, Spread
from edgedistill.runtime import Generation
from edgedistill.teacher.client import Call, Trace


class Streams(Protocol):
    """The part of a TeacherClient that is timed."""

    def stream(self, call: Call) -> Trace: ...


class Keeps(Protocol):
    """The part of a TraceStore that is used here."""

    def get(self, key: str) -> Trace | None: ...
    def put(self, trace: Trace) -> None: ...


@dataclass(frozen=True)
class Timing:
    """One answer: seconds to its end and to its first token (None: not told), and its tokens."""

    seconds: float
    first: float | None
    tokens: int

    @property
    def tokens_per_second(self) -> float | None:
        """Decode rate; None for an answer too short to have one."""
        if self.first is None or self.tokens < 2 or self.seconds <= self.first:
            return None
        return (self.tokens - 1) / (self.seconds - self.first)


@dataclass
class Asker:
    """One server that is asked prompt by prompt. An answered call is kept and not asked again."""

    who: str
    client: Streams
    call: Callable[[EvalRow], Call]
    store: Keeps
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # row ID -> reason

    def known(self, row: EvalRow) -> Trace | None:
        trace = self.store.get(self.call(row).key)
        return trace if trace is not None and trace.failure is None else None

    def ask(self, row: EvalRow) -> Trace | None:
        """The answered trace of a row, or None when it failed (the reason is in `failed`)."""
        if (known := self.known(row)) is not None:
            self.reused += 1
            return known
        trace = self.client.stream(self.call(row))
        if trace.failure is not None:
            self.failed[row.id] = trace.failure
            return None
        self.store.put(trace)
        return trace

    def warm_up(self, row: EvalRow) -> float:
        """Seconds of one answer that is neither counted nor kept.

        Raises:
            TeacherError: the server does not answer it.
        """
        started = time.perf_counter()
        trace = self.client.stream(self.call(row))
        if trace.failure is not None:
            what = f"the {self.who} did not answer the warm-up prompt: {trace.why}"
            raise TeacherError(what)
        return time.perf_counter() - started


def choose(rows: Sequence[EvalRow], count: int, seed: int) -> list[EvalRow]:
    """`count` rows, chosen by ID alone: one more prompt in the mix changes at most one of them."""
    return sorted(rows, key=lambda row: shuffled(row.id, seed))[:count]


def in_turn(
    teacher: Asker, student: Asker, rows: Sequence[EvalRow], progress: Progress
) -> list[tuple[Timing, Timing]]:
    """Teacher and student answer each row one behind the other; rows that one of them does not
    answer count for neither.

    Raises:
        TeacherError: not one row was answered by both.
    """
    pairs = []
    with progress.task("latency, teacher and student in turn", len(rows), "prompts") as task:
        for row in rows:
            first = teacher.ask(row)
            second = student.ask(row) if first is not None else None
            if first is not None and second is not None:
                pairs.append((_timing(first), _timing(second)))
            task.advance()
    if not pairs:
        reasons = {**teacher.failed, **student.failed}
        raise TeacherError(
            f"none of {len(rows)} timed prompts was answered by teacher and student: "
            f"{next(iter(reasons.values()), 'no reason given')}"
        )
    return pairs


def alone(asker: Asker, rows: Sequence[EvalRow], progress: Progress) -> list[Timing]:
    """One server answers each row; rows it does not answer do not count.

    Raises:
        TeacherError: not one row was answered.
    """
    timings = []
    with progress.task(f"latency, {asker.who}", len(rows), "prompts") as task:
        for row in rows:
            trace = asker.ask(row)
            if trace is not None:
                timings.append(_timing(trace))
            task.advance()
    if not timings:
        reason = next(iter(asker.failed.values()), "no reason given")
        raise TeacherError(f"none of {len(rows)} timed prompts was answered: {reason}")
    return timings


def _timing(trace: Trace) -> Timing:
    return Timing(trace.latency_seconds, trace.time_to_first_token, trace.completion_tokens)


def in_process(
    generate: Callable[[EvalRow], Generation], rows: Sequence[EvalRow], progress: Progress
) -> list[Timing]:
    """The student as an app with an embedded runtime sees it: prompt rendered, tokenized,
    answered. Seconds include rendering and tokenization; the stop token does not count, as over
    HTTP."""
    timings = []
    with progress.task("latency, student in process", len(rows), "prompts") as task:
        for row in rows:
            started = time.perf_counter()
            made = generate(row)
            seconds = time.perf_counter() - started
            before = seconds - made.total_seconds  # rendering, tokenization, the way to the child
            first = before + made.time_to_first_token
            timings.append(Timing(seconds, first, len(made.ids)))
            task.advance()
    return timings


def summary(
    who: str,
    timings: Sequence[Timing],
    cold_start: float | None,
    peak_memory: int | None,
    reused: int = 0,
) -> Latency:
    """The percentiles of one model's timings."""
    return Latency(
        who=who,
        prompts=len(timings),
        time_to_first_token=spread([t.first for t in timings if t.first is not None]),
        end_to_end=spread([t.seconds for t in timings]),
        tokens_per_second=spread([r for t in timings if (r := t.tokens_per_second) is not None]),
        answer_tokens_mean=float(np.mean([t.tokens for t in timings])),
        cold_start_seconds=cold_start,
        peak_memory_bytes=peak_memory,
        end_to_end_seconds=[round(t.seconds, 6) for t in timings],
        reused=reused,
    )


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation between the closest ranks; zeros for no values."""
    if not values:
        return Spread(0.0, 0.0, 0.0, 0.0)
    p50, p95, p99 = (float(v) for v in np.percentile(values, [50, 95, 99]))
    return Spread(p50, p95, p99, float(np.mean(values)))


def llama_bench(figures: Mapping[str, Sequence[float]], threads: int) -> list[LlamaBench]:
    """Mean and sample standard deviation of `{"pp": [tokens/s], "tg": [tokens/s]}`."""
    named = {"pp512": figures["pp"], "tg128": figures["tg"]}
    return [
        LlamaBench(
            test,
            mean=float(np.mean(rates)),
            std=float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0,
            runs=len(rates),
            threads=threads,
        )
        for test, rates in named.items()
    ]


def peak_memory(pid: int) -> int | None:
    """Largest resident size of a server process so far, in bytes; None when it is gone.

    The kernel keeps it on Linux and Windows, so nothing samples while latency is measured; macOS
    tells only the size now, which for a server that has answered is close to its peak.
    """
    status = Path(f"/proc/{pid}/status")
    try:
        if status.is_file():
            line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        info = psutil.Process(pid).memory_info()
    except (psutil.Error, OSError, StopIteration):
        return None
    return int(getattr(info, "peak_wset", info.rss))
