"""collect: ask the teacher every prompt of the token mix that the workspace has no answer to yet.

Answers live in the trace store (`<out>/traces.db`) from the moment they arrive, so a killed run
goes on where it was, and a changed recipe pays only for what changed. The stage's folder holds
`traces.jsonl`, one trace a prompt in prompt order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    MANIFEST,
    Finished,
    Identity,
    Traces,
    canonical,
    digest_of,
    load_finished,
    run_stage,
)
from edgedistill.errors import CollectError
from edgedistill.progress import Progress
from edgedistill.recipe import CollectSpec, Teacher
from edgedistill.teacher import (
    Call,
    TeacherClient,
    Trace,
    TraceStore,
    call_for,
    open_endpoint,
    prompt_version,
    weights_identity,
)
from edgedistill.tokenmix import TokenMix

STORE = "traces.db"
TRACES = "traces.jsonl"
POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0
SHOWN_REASONS = 3
RETRY_HINT = "the same command with --retry-failed asks the failed ones again; answers are kept"


def collect(
    mix: TokenMix,
    teacher: Teacher,
    spec: CollectSpec,
    out: Path,
    progress: Progress,
    *,
    retry_failed: bool = False,
) -> Traces:
    """Have an answer, or the reason why there is none, for every prompt.

    Prompts with the same text share one call. A failed call is kept as failed and asked again
    only with `retry_failed`. The endpoint is opened only when a call is missing.

    Raises:
        CollectError: a call failed and the recipe says stop, or too many failed.
        TeacherUnreachable, TeacherRefused: no call can work.
        KeyboardInterrupt: after answers in flight had 15 s to arrive.
    """
    calls = [call_for(entry, teacher) for entry in mix.entries]
    identity = _identity(calls, teacher)
    if retry_failed:
        _reopen(identity.folder(out))

    def work(folder: Path) -> dict[str, Any]:
        with TraceStore(out / STORE) as store:
            asked = _ask_missing(calls, teacher, spec, store, progress, retry_failed)
            facts = _write(calls, store, folder / TRACES)
        answered, prompts = facts["answered"], facts["prompts"]
        progress.note(f"{answered} of {prompts} prompts answered, {asked} of them asked now")
        return {**facts, "asked_in_this_run": asked}

    return _accepted(run_stage(identity, out, progress, work), spec, progress)


def _accepted(done: Finished, spec: CollectSpec, progress: Progress) -> Traces:
    """Holds a reused folder too against the rule: it may be stricter than when it was made."""
    facts = done.facts
    tally = _Tally(spec, facts["prompts"], facts["failures"])
    tally.check(still_open=False)
    if facts["failed"]:
        progress.note(f"{tally}; {RETRY_HINT}")
    return Traces(
        folder=done.folder,
        digest=facts["digest"],
        file=done.folder / TRACES,
        answered=facts["answered"],
        failed=facts["failed"],
    )


def _identity(calls: Sequence[Call], teacher: Teacher) -> Identity:
    """What is asked, not how fast: concurrency and timeouts do not shape an answer."""
    return Identity(
        stage="collect",
        version=1,
        spec={
            "model": teacher.model,
            "weights": weights_identity(teacher),
            "system": teacher.system,
            "sampling": teacher.sampling.model_dump(mode="json"),
            "prompt_version": prompt_version(teacher),
        },
        inputs={"calls": digest_of([[call.prompt_id, call.key] for call in calls])},
    )


def _reopen(folder: Path) -> None:
    """A complete folder with failures becomes torn, so that the stage runs again."""
    done = load_finished(folder, reused=True)
    if done is not None and done.facts["failed"]:
        (folder / MANIFEST).unlink()


def _kept(store: TraceStore, call: Call) -> Trace:
    """The stored trace under this prompt's names; another prompt may have asked for it."""
    trace = store.get(call.key)
    assert trace is not None
    return replace(trace, prompt_id=call.prompt_id, prompt_version=call.prompt_version)


def _write(calls: Sequence[Call], store: TraceStore, file: Path) -> dict[str, Any]:
    """Write the traces in the order of `calls`, and what is told of them. One at a time, since
    the log-probabilities of all of them can be more than the memory holds."""
    traces, parts = [], []
    with file.open("wb") as stream:
        for call in calls:
            t = _kept(store, call)
            stream.write((canonical(t.to_json()) + "\n").encode())
            parts.append([t.prompt_id, t.key, t.text, t.finish_reason, t.failure])
            if "logprobs" in t.parameters:
                parts[-1].append(digest_of(t.top_logprobs))
            traces.append(replace(t, top_logprobs=None))
    return {**_facts(traces), "digest": digest_of(parts)}


def _facts(traces: Sequence[Trace]) -> dict[str, Any]:
    answered = [trace for trace in traces if trace.failure is None]
    once = {trace.key: trace for trace in answered}.values()
    seconds = [trace.latency_seconds for trace in once]
    return {
        "prompts": len(traces),
        "calls": len({trace.key for trace in traces}),
        "answered": len(answered),
        "failed": len(traces) - len(answered),
        "failures": dict(Counter(t.failure for t in traces if t.failure is not None)),
        "prompt_tokens": sum(trace.prompt_tokens for trace in once),
        "completion_tokens": sum(trace.completion_tokens for trace in once),
        "mean_latency_seconds": round(sum(seconds) / len(seconds), 4) if seconds else None,
        "models_answered": sorted({trace.model_answered for trace in answered}),
    }


class _Tally:
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


def _ask_missing(
    calls: Sequence[Call],
    teacher: Teacher,
    spec: CollectSpec,
    store: TraceStore,
    progress: Progress,
    retry_failed: bool,
) -> int:
    """Ask what the store does not hold; the number of calls asked."""
    prompts = Counter(call.key for call in calls)
    tally = _Tally(spec, len(calls))
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
