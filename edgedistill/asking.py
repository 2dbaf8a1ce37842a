"""Asking the teacher many calls: what the trace store holds is not asked again, several are in
flight, and too many failures end it.

Used by the stages `collect` (every prompt) and `distill` (what the teacher thinks of answers)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from edgedistill.artifacts import canonical
from edgedistill.crew import Crew
from edgedistill.errors import CollectError
from edgedistill.progress import Progress
from edgedistill.recipe import CollectSpec, Teacher
from edgedistill.teacher import (
    TEACHER,
    Call,
    Named,
    TeacherClient,
    Trace,
    TraceStore,
    open_endpoint,
)

STORE = "traces.db"
SHOWN_REASONS = 3
RETRY_HINT = "{} with --retry-failed asks the failed ones again; answers are kept"


class Tally:
    """Failed prompts by reason, held against the recipe's rule. `commands`: those that ask them
    again, for `hint`."""

    def __init__(
        self,
        spec: CollectSpec,
        total: int,
        commands: str,
        failures: Mapping[str, int] | None = None,
    ) -> None:
        self._spec = spec
        self._total = total
        self.hint = RETRY_HINT.format(commands)
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
            why = f"{self}, more than a max_failed_share of {spec.max_failed_share:.3g} allows"
        else:
            return
        raise CollectError(why + ("; stopped asking" if still_open else ""), hint=self.hint)

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
    named: Named = TEACHER,
    *,
    commands: str,
) -> int:
    """Ask what the store does not hold; the number of calls asked. Each answer is stored when it
    arrives, and a failure too; those are asked again only with `retry_failed`. `named` is who is
    asked, for progress and errors; `commands` have --retry-failed for these calls.

    Raises:
        CollectError: more calls failed than `spec` allows.
        TeacherUnreachable, TeacherRefused: no call can work.
        KeyboardInterrupt: after answers in flight had 15 s to arrive.
    """
    prompts = Counter(call.key for call in calls)
    tally = Tally(spec, len(calls), commands)
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

    with open_endpoint(teacher, progress, named) as endpoint:
        client = TeacherClient(endpoint, spec.timeout_seconds, spec.attempts, spec.backoff_seconds)
        with client:
            label = f"asking {named.who}"
            _ask_all(ordered, _crew(client, store, judge), spec.concurrency, label, progress)
    return len(ordered)


def _cache_friendly(calls: Sequence[Call]) -> list[Call]:
    """Calls that share all but the last message follow each other, else in token-mix order."""
    first: dict[str, int] = {}
    shared = [canonical(list(call.messages[:-1])) for call in calls]
    for position, start in enumerate(shared):
        first.setdefault(start, position)
    order = sorted(range(len(calls)), key=lambda i: (first[shared[i]], i))
    return [calls[i] for i in order]


def _crew(
    client: TeacherClient, store: TraceStore, judge: Callable[[Trace], None]
) -> Crew[Call, Trace]:
    """Each thread stores an answer before it reports it."""
    judging = threading.Lock()

    def work(call: Call) -> Trace:
        trace = client.ask(call)
        # A call that was cut short by the end of the run did not fail.
        if trace.failure is None or not crew.stopping:
            store.put(trace)
            with judging:
                judge(trace)
        return trace

    crew = Crew(work, client.close)
    return crew


def _ask_all(
    calls: Sequence[Call],
    crew: Crew[Call, Trace],
    concurrency: int,
    label: str,
    progress: Progress,
) -> None:
    with progress.task(label, len(calls), "calls") as task:
        try:
            crew.start(calls, min(concurrency, len(calls)))
            for _ in calls:
                task.advance(1, crew.next().prompt_id)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                progress.note("stopping: waiting for answers in flight (Ctrl-C again: no waiting)")
            crew.stop()
            raise
