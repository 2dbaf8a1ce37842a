"""Asking the teacher many calls: what the trace store holds is not asked again, several are in
flight, and too many failures end it.

Used by the stages `collect` (every prompt) and `distill` (what the teacher thinks of answers)."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from edgedistill.artifacts import canonical
from edgedistill.errors import CollectError
from edgedistill.progress import Progress
from edgedistill.recipe import CollectSpec, Teacher
from edgedistill.teacher import Call, TeacherClient, Trace, TraceStore, open_endpoint

STORE = "traces.db"
POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0
SHOWN_REASONS = 3
RETRY_HINT = "the same command with --retry-failed asks the failed ones again; answers are kept"


class Tally:
    """Failed prompts by reason, held against the recipe's rule."""

    def __init__(self, spec: CollectSpec, total: int, failures: Mapping[str, int] | None = None):
        self._spec = spec
        self._total = total
        self._failures = Counter(failures or {})
        self._first = ""

    def add(self, trace: Trace, prompts: int) -> None:
        assert trace.failure is not None
        self._failures[trace.failure] += prompts
        self._first = self._first or trace.failure_detail

    def check(self, *, still_open: bool) -> None:
        """Raises CollectError as soon as the rule can no longer be kept."""
        failed, spec = self._failures.total(), self._spec
        if failed and spec.on_failure == "stop":
            why = f"{self}, and the recipe says on_failure: stop"
        elif failed > spec.max_failed_share * self._total:
            why = f"{self}, more than the recipe's max_failed_share of {spec.max_failed_share:.3g}"
        else:
            return
        raise CollectError(why + ("; stopped asking" if still_open else ""), hint=RETRY_HINT)

    def __str__(self) -> str:
        common = self._failures.most_common(SHOWN_REASONS)
        reasons = ", ".join(f"{reason}: {count}" for reason, count in common)
        more = " and others" if len(self._failures) > SHOWN_REASONS else ""
        said = f"; the first said: {self._first}" if self._first else ""
        return f"{self._failures.total()} of {self._total} calls failed ({reasons}{more}{said})"


def ask_missing(
    calls: Sequence[Call],
    teacher: Teacher,
    spec: CollectSpec,
    store: TraceStore,
    progress: Progress,
    retry_failed: bool = False,
) -> int:
    """Ask what the store does not hold; the number of calls asked. Each answer is stored when it
    arrives, and a failure too; those are asked again only with `retry_failed`.

    Raises:
        CollectError: more calls failed than `spec` allows.
        TeacherUnreachable, TeacherRefused: no call can work.
        KeyboardInterrupt: after answers in flight had 15 s to arrive.
    """
    prompts = Counter(call.key for call in calls)
    tally = Tally(spec, len(calls))
    missing: dict[str, Call] = {}
    for call in {call.key: call for call in reversed(calls)}.values():
        kept = store.get(call.key)
        if kept is None or (kept.failure is not None and retry_failed):
            missing[call.key] = call
        elif kept.failure is not None:
            tally.add(kept, prompts[call.key])
    tally.check(still_open=bool(missing))
    if not missing:
        return 0
    ordered = _cache_friendly([call for call in calls if missing.get(call.key) is call])

    def judge(trace: Trace) -> None:
        if trace.failure is not None:
            tally.add(trace, prompts[trace.key])
            tally.check(still_open=True)

    with open_endpoint(teacher, progress) as endpoint:
        client = TeacherClient(endpoint, spec.timeout_seconds, spec.attempts, spec.backoff_seconds)
        with client:
            _ask_all(ordered, _Crew(client, store, judge), spec.concurrency, progress)
    return len(ordered)


def _cache_friendly(calls: Sequence[Call]) -> list[Call]:
    """Calls that share all but the last message follow each other, else in token-mix order."""
    first: dict[str, int] = {}
    shared = [canonical(list(call.messages[:-1])) for call in calls]
    for position, start in enumerate(shared):
        first.setdefault(start, position)
    order = sorted(range(len(calls)), key=lambda i: (first[shared[i]], i))
    return [calls[i] for i in order]


class _Crew:
    """Threads that take calls from one queue; each stores an answer before it reports it."""

    def __init__(
        self, client: TeacherClient, store: TraceStore, judge: Callable[[Trace], None]
    ) -> None:
        self.todo: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Trace | BaseException] = queue.SimpleQueue()
        self._client = client
        self._store = store
        self._judge = judge
        self._judging = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        # Daemons: a call that hangs must not keep a build alive that was told to end.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def next(self) -> Trace:
        """The next trace; raises what ended a thread."""
        while True:
            try:
                # With a timeout, since Windows does not let Ctrl-C through an endless wait.
                result = self._done.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def stop(self) -> None:
        """Start no other call, and give those in flight some time."""
        self._stop.set()
        self._client.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                trace = self._client.ask(self.todo.get_nowait())
                # A call that was cut short by the end of the run did not fail.
                if trace.failure is None or not self._stop.is_set():
                    self._store.put(trace)
                    with self._judging:
                        self._judge(trace)
                self._done.put(trace)
        except queue.Empty:
            return
        except BaseException as error:
            self._stop.set()
            self._done.put(error)


def _ask_all(calls: Sequence[Call], crew: _Crew, concurrency: int, progress: Progress) -> None:
    for call in calls:
        crew.todo.put(call)
    with progress.task("asking the teacher", len(calls), "calls") as task:
        try:
            crew.start(min(concurrency, len(calls)))
            for _ in calls:
                task.advance(1, crew.next().prompt_id)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                progress.note("stopping: waiting for answers in flight (Ctrl-C again: no waiting)")
            crew.stop()
            raise
