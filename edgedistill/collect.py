"""collect: ask the teacher every prompt of the token mix that the workspace has no answer to yet.

Answers live in the trace store (`<out>/traces.db`) from the moment they arrive, so a killed run
goes on where it was, and a changed recipe pays only for what changed. The stage's folder holds
`traces.jsonl`, one trace a prompt in prompt order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from edgedistill.asking import STORE, Tally, ask_missing
from edgedistill.progress import Progress
from edgedistill.recipe import CollectSpec, Teacher
from edgedistill.teacher import (
    Call,
    Trace,
    TraceStore,
    call_for,
    prompt_version,
    weights_identity,
)
from edgedistill.tokenmix import TokenMix

TRACES = "traces.jsonl"
COMMANDS = "`build` or `collect`"  # have --retry-failed


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
            asked = ask_missing(
                calls, teacher, spec, store, progress, retry_failed, commands=COMMANDS
            )
            facts = _write(calls, store, folder / TRACES)
        answered, prompts = facts["answered"], facts["prompts"]
        progress.note(f"{answered} of {prompts} prompts answered, {asked} of them asked now")
        return {**facts, "asked_in_this_run": asked}

    return _accepted(run_stage(identity, out, progress, work), spec, progress)


def _accepted(done: Finished, spec: CollectSpec, progress: Progress) -> Traces:
    """Holds a reused folder too against the rule: it may be stricter than when it was made."""
    facts = done.facts
    tally = Tally(spec, facts["prompts"], COMMANDS, facts["failures"])
    tally.check(still_open=False)
    if facts["failed"]:
        progress.note(f"{tally}; {tally.hint}")
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
