"""One sitting at a server: what an endpoint gives on the user's prompts, into a Result.

All that a server shows is measured by streaming; what its machine does beside is not known. The
prompts are asked in several passes, each in an order of its own.
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgedistill import __version__, machine
from edgedistill.check_specs import Check
from edgedistill.checks import Checker, check_identity
from edgedistill.conditions import Conditions, changes, read_conditions
from edgedistill.errors import TeacherError, UsageError
from edgedistill.fidelity import EvalRow
from edgedistill.likeness import Given, likeness_of, notes_of, ready_checker
from edgedistill.load_watch import BUSY_SHARE, LoadWatch, warn_of
from edgedistill.measures import Measure, measure
from edgedistill.progress import Progress
from edgedistill.prompts import Prompts, mix_facts
from edgedistill.result_file import Result
from edgedistill.server_prompt import AskedServer, settings_of
from edgedistill.sitting import UNJUDGED, percentiles
from edgedistill.streaming import Pass, Stop, Streamed, ask_all
from edgedistill.teacher import TeacherClient

TIMEOUT_SECONDS, ATTEMPTS, BACKOFF_SECONDS = 120.0, 3, 1.0
WARM_UP = 1  # calls before the first that counts
V1_HINT = "does the URL end where the API starts (/v1), and does this model answer chats?"


@dataclass(frozen=True)
class ServerPlan:
    """What is asked, in how many passes, and how many prompts at once."""

    prompts: Prompts
    passes: int = 3
    streams: Sequence[int] = (1,)
    check: Check | None = None
    seed: int = 0
    max_calls: int | None = None
    backoff_seconds: float = BACKOFF_SECONDS

    @property
    def calls(self) -> int:
        """All calls that are made, tries of failed ones not counted."""
        timed = self.passes * len(self.streams) * len(self.prompts.rows)
        return WARM_UP + timed + len(self.prompts.refused)


@dataclass(frozen=True)
class ServerSitting:
    """What was measured, and why it ended before all was; None: it did not."""

    result: Result
    stopped: Stop | None


def sit_at(asked: AskedServer, plan: ServerPlan, progress: Progress) -> ServerSitting:
    """Measure a server. One that fails midway, and Ctrl-C, give a result of what was answered
    until then.

    Raises:
        UsageError: more calls than `plan.max_calls`, or more streams than prompts.
        TeacherError: the server did not answer at all.
    """
    _require(plan)
    checker = ready_checker(plan.check)
    _tell(asked, plan, progress)
    watch, before = None, None
    if asked.here:
        with progress.task("listening to other work on this machine", None):
            watch, before = LoadWatch(), read_conditions()
            warn_of(watch.before, progress)
    client = TeacherClient(asked.endpoint, TIMEOUT_SECONDS, ATTEMPTS, plan.backoff_seconds)
    with client:
        _warm_up(client, asked, plan.prompts.rows[0])
        made = _passes(client, asked, plan, progress)
        refused = _refused(client, asked, plan, made)
    stopped = next((one.stopped for one in (*made, refused) if one.stopped is not None), None)
    if stopped is not None and not any(one.answered for one in made):
        raise stopped
    load, told = _load(watch)
    likeness, of_answers = _likeness(plan, checker, made, refused, progress)
    return ServerSitting(
        Result(
            made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            edgedistill=__version__,
            model=_model(asked, made),
            device=_device(asked),
            load=load,
            conditions=_conditions(before),
            settings={
                "passes": plan.passes, "streams": list(plan.streams), "seed": plan.seed,
                "calls": _counts(plan, made), **settings_of(asked),
            },
            figures=_figures(plan, made),
            token_mix=mix_facts(plan.prompts),
            check=None if plan.check is None else check_identity(plan.check),
            likeness=likeness,
            notes=[told, *_of_calls(plan, made), *of_answers, *_of_end(plan, made, stopped)],
        ),
        stopped,
    )  # fmt: skip


def _require(plan: ServerPlan) -> None:
    count = len(plan.prompts.rows)
    if max(plan.streams) > count:
        what = f"--streams {max(plan.streams)}: there are {count} prompts to ask at once"
        raise UsageError(what, hint="ask fewer at once, or give more prompts")
    if plan.max_calls is not None and plan.calls > plan.max_calls:
        raise UsageError(
            f"this makes {plan.calls} calls, and --max-calls allows {plan.max_calls}",
            hint="--sample and --repeats make them fewer",
        )


def _tell(asked: AskedServer, plan: ServerPlan, progress: Progress) -> None:
    levels = f" with each of {len(plan.streams)} --streams" if len(plan.streams) > 1 else ""
    refused = len(plan.prompts.refused)
    beside = f", and {refused} that the teacher refuses" if refused else ""
    progress.note(
        f"{plan.calls} calls: {WARM_UP} to warm up, then {plan.passes} passes over "
        f"{len(plan.prompts.rows)} prompts{levels}{beside}; a failed one is tried "
        f"{ATTEMPTS} times at most"
    )
    sampling, system = asked.teacher.sampling, asked.teacher.system
    said = "no system message" if not system else f"a system message of {len(system)} characters"
    progress.note(
        f"asked {asked.way}: {said}, temperature {sampling.temperature:g}, at most "
        f"{sampling.max_tokens} tokens"
    )


def _warm_up(client: TeacherClient, asked: AskedServer, row: EvalRow) -> None:
    trace, answer = client.timed(asked.call(row))
    if answer is None:
        what = f"the server did not answer the first call: {trace.why}"
        raise TeacherError(what, where=asked.endpoint.base_url, hint=V1_HINT)


def _passes(
    client: TeacherClient, asked: AskedServer, plan: ServerPlan, progress: Progress
) -> list[Pass]:
    made = []
    timed = plan.calls - WARM_UP - len(plan.prompts.refused)
    with progress.task("measuring", timed, "calls") as task:
        for number, streams in itertools.product(range(plan.passes), plan.streams):
            rows = list(plan.prompts.rows)
            random.Random(f"{plan.seed}-{number}").shuffle(rows)
            calls = {row.id: asked.call(row) for row in rows}
            made.append(ask_all(client, calls, streams, task.advance))
            if made[-1].stopped is not None:
                break
    return made


def _refused(
    client: TeacherClient, asked: AskedServer, plan: ServerPlan, made: Sequence[Pass]
) -> Pass:
    """Prompts that the teacher refuses, one behind the other; none where the server has ended."""
    rows = plan.prompts.refused if all(one.stopped is None for one in made) else ()
    calls = {row.id: asked.call(row) for row in rows}
    return ask_all(client, calls, 1, lambda: None) if calls else Pass(1, 0.0)


def _figures(plan: ServerPlan, made: Sequence[Pass]) -> dict[str, Measure]:
    """By name; those of several streams have @s and their number behind it."""
    figures: dict[str, Measure] = {}
    for streams in plan.streams:
        passes = [one for one in made if one.streams == streams and one.answered]
        each = [list(one.answered.values()) for one in passes]
        found = percentiles(
            {
                "time_to_first_token": [[s for a in one for s in _came(a)[:1]] for one in each],
                "end_to_end": [[a.answer.total_seconds for a in one] for one in each],
                "inter_chunk": [[s for a in one for s in _between(a)] for one in each],
                "time_per_output_token": [
                    [s for a in one if (s := a.per_token_seconds) is not None] for one in each
                ],
            }
        )
        rates = [rate for one in passes if (rate := one.tokens_per_second) is not None]
        if rates and len(rates) == len(passes):
            found["tokens_per_second"] = measure([[rate] for rate in rates], "tokens/s")
        behind = "" if streams == 1 else f"@s{streams}"
        figures |= {f"{name}{behind}": figure for name, figure in found.items()}
    return figures


def _came(one: Streamed) -> tuple[float, ...]:
    return one.answer.chunk_seconds


def _between(one: Streamed) -> list[float]:
    return [late - early for early, late in itertools.pairwise(one.answer.chunk_seconds)]


def _likeness(
    plan: ServerPlan,
    checker: Checker | None,
    made: Sequence[Pass],
    refused: Pass,
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Of each prompt its first answer, and notes on all of them."""
    given = {row.id: [one.answered[row.id] for one in made if row.id in one.answered]
             for row in plan.prompts.rows}  # fmt: skip
    first = [_given(row, said[0]) for row in plan.prompts.rows if (said := given[row.id])]
    others = [
        _given(row, refused.answered[row.id])
        for row in plan.prompts.refused
        if row.id in refused.answered
    ]
    unlike = sum(len({one.answer.text for one in said}) > 1 for said in given.values())
    notes = []
    every = [one for said in given.values() for one in said]
    if empty := [one for one in every if not one.answer.text.strip()]:
        notes.append(f"{_counted(empty, 'answer')} without text: only their end_to_end counts")
    if plan.check is None:
        notes.append(UNJUDGED)
    if unlike:
        notes.append(f"not the same answer in all passes: {unlike} of {len(first)} prompts")
    found = likeness_of(
        plan.prompts, plan.check, checker, first, others, unlike, plan.seed, progress
    )
    return found, notes + notes_of(found)


def _given(row: EvalRow, one: Streamed) -> Given:
    trace_id = {"trace_id": one.trace.trace_id}
    return Given(row, one.answer.text, one.trace.finish_reason, trace_id)


def _counts(plan: ServerPlan, made: Sequence[Pass]) -> dict[str, int]:
    return {
        "planned": plan.calls - WARM_UP - len(plan.prompts.refused),
        "answered": sum(len(one.answered) for one in made),
        "failed": sum(len(one.failed) for one in made),
    }


def _of_calls(plan: ServerPlan, made: Sequence[Pass]) -> list[str]:
    notes, answered = [], [one for each in made for one in each.answered.values()]
    if failed := [trace for each in made for trace in each.failed.values()]:
        notes.append(
            f"{_counted(failed, 'call')} failed and count for nothing; the first: {failed[0].why}"
        )
    if again := [one for one in answered if one.trace.attempts > 1]:
        said = "answered at a later try, whose times these are"
        notes.append(f"{_counted(again, 'call')} {said}")
    if cached := sum(one.answer.cached_tokens for one in answered):
        share = cached / max(sum(one.answer.prompt_tokens for one in answered), 1)
        notes.append(
            f"{share:.0%} of the prompts' tokens came from the server's cache: the first token of "
            "a new prompt comes later"
        )
    return notes


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _of_end(plan: ServerPlan, made: Sequence[Pass], stopped: Stop | None) -> list[str]:
    if stopped is None:
        return []
    counts = _counts(plan, made)
    why = "interrupted" if isinstance(stopped, KeyboardInterrupt) else stopped.what
    return [
        f"ended after {counts['answered']} of {counts['planned']} answers, and the figures are of "
        f"these: {why}"
    ]


def _load(watch: LoadWatch | None) -> tuple[dict[str, Any], str]:
    """Other work, and what is known of it. A server here is no child of ours, so while it is
    measured its own work cannot be told from others'."""
    if watch is None:
        return {"before": None, "during": None, "busy": None}, (
            "the server's machine is not listened to: whether other work disturbed these figures "
            "is not known"
        )
    before = watch.stop().before or 0.0
    busy = before > BUSY_SHARE
    told = (
        "the server is on this machine, and its work cannot be told from others': other work was "
        "listened to before alone"
    )
    if busy:
        told += (
            f", and took {before:.0%} of the processor time (more than {BUSY_SHARE:.0%}): these "
            "figures are no measure of it"
        )
    return {"before": before, "during": None, "busy": busy}, told


def _conditions(before: Conditions | None) -> dict[str, Any]:
    if before is None:
        return {"before": None, "after": None, "joules": None, "throttled": None}
    after = read_conditions()
    return {"before": asdict(before), "after": asdict(after), **changes(before, after)}


def _model(asked: AskedServer, made: Sequence[Pass]) -> dict[str, Any]:
    """A server tells no file: only IDs identify what answered."""
    answered = {one.trace.model_answered for each in made for one in each.answered.values()}
    return {
        "name": asked.teacher.model,
        "file": None,
        "sha256": None,
        "bytes": None,
        "types": {},
        "bundle": None,
        "answered": sorted(filter(None, answered)),
    }


def _device(asked: AskedServer) -> dict[str, Any]:
    known = machine.facts() if asked.here else {"cpu": None, "fingerprint": None}
    return {
        "address": asked.endpoint.base_url,
        **known,
        "runtime": {"name": "chat-completions server"},
        "asked_from": machine.fingerprint(),
    }
