"""One sitting: a model file measured at a place, or several in turn, into a Result of each.

It is loaded in several processes one behind the other, since two processes differ by more than two
runs of one; each asks the prompts in an order of its own. Several models take turns, process by
process, so that a machine that changes favours none. Other work is listened to before and counted
throughout, so that a disturbed figure is told from a slow one.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgedistill import __version__
from edgedistill.ceilings import Ceilings
from edgedistill.check_specs import Check
from edgedistill.checks import Checker, check_identity
from edgedistill.conditions import Conditions, changes, spent
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import EvalRow
from edgedistill.likeness import Given, likeness_of, notes_of, ready_checker
from edgedistill.load_watch import Load, warn_of
from edgedistill.measures import Measure, measure
from edgedistill.model_prompt import Asked, model_facts
from edgedistill.places import (
    HERE,
    NO_CEILINGS,
    NONE,
    Here,
    Last,
    Place,
    heard,
    kernels_of,
    last_told,
)
from edgedistill.progress import Progress, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.prompts import Prompts, mix_facts
from edgedistill.rates import (
    PREFILL_TOKENS,
    More,
    Rates,
    bench_step,
    bench_together,
    require_cores,
    require_depths,
)
from edgedistill.reached import reached
from edgedistill.result_file import Result
from edgedistill.runtime import Generation
from edgedistill.runtimes import asked_ids

SHORT_CONTEXT = 256
TURNS, TURN_RUNS = 20, 2
NO_MORE = More()
LACKING = "pp512{0} and tg128{0} were not measured in process {1} of {2}: {3}"
UNJUDGED = "the answers are in the result, but not judged: no check; give --recipe NAME"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    processes: int = 3
    runs: int = 3  # of pp512 and tg128, in each process
    turns: int = TURNS  # of several models: in each one process of each, for pp512 and tg128
    threads: int | None = None
    more: More = NO_MORE
    prompts: Prompts | None = None
    check: Check | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Seen:
    """What one process gave that answered the prompts; without prompts it has only loaded."""

    start_seconds: float
    cold_seconds: float | None
    more: Rates  # what was timed beside; none where the runtime refused that
    answers: dict[str, tuple[float, Generation]]  # by prompt ID: seconds with tokenization
    peak_memory: int
    joules: float | None  # spent while the prompts were answered, where the device tells it
    refused: dict[str, str]  # answers to prompts that the teacher refuses, of the first process


@dataclass(frozen=True)
class _Rated:
    """What one process gave that was timed by llama-bench's convention."""

    rates: Rates
    peak_memory: int


@dataclass
class _Model:
    """One of the models, and what its processes gave."""

    asked: Asked
    facts: dict[str, Any]
    prompt: StudentPrompt | None
    seen: list[_Seen] = field(default_factory=list)
    rated: list[_Rated] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)  # notes on what a process did not give
    kernels: dict[str, str] = field(default_factory=dict)  # of the runtime, where it tells them


def sit(asked: Asked, plan: Plan, progress: Progress, place: Place | None = None) -> Result:
    """Measure one model file; as sit_in_turn."""
    return sit_in_turn([asked], plan, progress, place)[0]


def sit_in_turn(
    models: Sequence[Asked], plan: Plan, progress: Progress, place: Place | None = None
) -> list[Result]:
    """Measure model files at `place`, or here, process by process in turn. There must be memory to
    load all of them at once.

    Raises:
        RuntimeFailure: the runtime refuses one. WeightsError: one has no prompt that can be used.
        UsageError: a depth is beyond its context, or there are more threads than cores.
        TeacherError: the judge of the check cannot be asked.
    """
    for asked in models:
        require_depths(asked.file, plan.more.depths)
    checker = None if plan.prompts is None else ready_checker(plan.check)
    place = place or Here()
    device, rows = place.facts(), plan.prompts.rows if plan.prompts is not None else []
    measured = [_Model(each, model_facts(each), each.prompt() if rows else None) for each in models]
    require_cores([plan.threads or 1, *plan.more.threads], device["usable_cores"])
    threads = plan.threads or device["threads"]
    with progress.task(f"listening to other work ({place.address})", None):
        watch, before = place.watch(), place.conditions()
    warn_of(watch.before, progress)
    _measure(measured, plan, place, threads, progress)
    shared = _Shared(place, device, threads, before, last_told(place, watch, threads, progress))
    sitting = str(uuid.uuid4()) if len(models) > 1 else None
    return [_result(each, plan, shared, checker, sitting, progress) for each in measured]


@dataclass(frozen=True)
class _Shared:
    """What all models of a sitting share."""

    place: Place
    device: dict[str, Any]
    threads: int
    before: Conditions
    last: Last


def _measure(
    models: Sequence[_Model], plan: Plan, place: Place, threads: int, progress: Progress
) -> None:
    """All processes of all models, who goes first alternating."""
    prompts = 0 if plan.prompts is None else len(plan.prompts.rows)
    alone, timed = len(models) == 1, place.clock != NONE
    if timed and not alone:
        # First of all, since it needs most memory: nothing else is lost where that fails.
        turns = plan.turns * len(models)
        with progress.task("measuring rates in turn", turns, "processes") as task:
            for number in range(plan.turns):
                _rate(_in_turn(models, number), place, threads, TURN_RUNS, task)
    steps = plan.processes * (prompts + alone + len(plan.more.steps(threads)))
    with progress.task("measuring", len(models) * steps or None, "steps") as task:
        for number in range(plan.processes):
            for model in _in_turn(models, number):
                model.seen.append(_process(model, plan, place, threads, number, task))
                if alone and timed:
                    _rate(models, place, threads, plan.runs, task)


def _in_turn(models: Sequence[_Model], number: int) -> Sequence[_Model]:
    return models if number % 2 == 0 else models[::-1]


def _rate(models: Sequence[_Model], place: Place, threads: int, runs: int, task: Task) -> None:
    """One process of each, all of them loaded at once."""
    with contextlib.ExitStack() as held:
        loaded = [
            held.enter_context(
                place.open(model.asked.file, threads=threads, context_tokens=PREFILL_TOKENS)
            )
            for model in models
        ]
        found = bench_together(loaded, runs)
        for model, runtime, rates in zip(models, loaded, found, strict=True):
            model.rated.append(_Rated(rates, runtime.peak_memory_bytes()))
            task.advance()


def _result(
    model: _Model,
    plan: Plan,
    shared: _Shared,
    checker: Checker | None,
    sitting: str | None,
    progress: Progress,
) -> Result:
    place, before, last = shared.place, shared.before, shared.last
    asked, seen = model.asked, model.seen
    figures = {} if place.clock == NONE else _figures(model)
    roofline, unknown = _reached(asked, figures, last.ceilings)
    likeness = _likeness(plan, checker, seen, progress)
    return Result(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        edgedistill=__version__,
        model=model.facts,
        device={"address": place.address, **shared.device,
                "runtime": {**place.runtime(asked.file), **model.kernels}},
        load={**asdict(last.load), "busy": last.load.busy},
        conditions={
            "before": asdict(before),
            "after": None if last.conditions is None else asdict(last.conditions),
            **changes(before, last.conditions),
        },
        settings={
            "processes": plan.processes, "runs": plan.runs, "threads": shared.threads,
            "seed": plan.seed, **({} if sitting is None else {"turns": plan.turns}),
            "depths": list(plan.more.depths), "thread_counts": list(plan.more.threads),
            "max_tokens": asked.spec.max_tokens, "system": asked.spec.system,
        },
        figures=figures,
        token_mix=mix_facts(plan.prompts),
        check=None if plan.check is None else check_identity(plan.check),
        likeness=likeness,
        roofline=roofline,
        notes=_notes(plan, last.load, likeness, place) + model.lacks + last.notes + unknown,
        sitting=sitting,
    )  # fmt: skip


def _reached(
    asked: Asked, figures: Mapping[str, Measure], ceilings: Ceilings | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The ceilings and what the model reached of them, or a note on why that is not known."""
    try:
        return None if ceilings is None else reached(asked.file, figures, ceilings), []
    except RuntimeFailure as error:
        return None, [NO_CEILINGS.format(error.what)]


def _notes(plan: Plan, load: Load, likeness: Mapping[str, Any] | None, place: Place) -> list[str]:
    notes = heard(place.clock, load)
    if likeness is not None and likeness["unlike"]:
        notes.append(f"{likeness['unlike']} answers were not the same in all processes")
    if plan.prompts is not None and plan.check is None:
        notes.append(UNJUDGED)
    return notes + notes_of(likeness)


def _process(
    model: _Model, plan: Plan, place: Place, threads: int, number: int, task: Task
) -> _Seen:
    """What there is `more` to time, and then one that answers the prompts."""
    asked, prompt = model.asked, model.prompt
    rows = list(plan.prompts.rows) if plan.prompts is not None else []
    random.Random(f"{plan.seed}-{number}").shuffle(rows)
    longest = asked.spec.max_tokens
    refused = plan.prompts.refused if plan.prompts is not None and number == 0 else ()
    context = SHORT_CONTEXT
    if prompt is not None:
        lengths = [len(prompt.prompt_ids(row.prompt, row.history)) for row in (*rows, *refused)]
        context = max(SHORT_CONTEXT, max(lengths) + longest)
    more = {} if place.clock == NONE else _more(model, plan, place, threads, number, task)
    started, cold, answers = time.perf_counter(), None, {}
    with place.open(asked.file, threads=threads, context_tokens=context) as runtime:
        ready = _seconds(place, started, runtime.facts.get("load_seconds", 0.0))
        model.kernels = kernels_of(runtime.facts)
        stop = runtime.end_ids()

        def answered(row: EvalRow) -> tuple[float, Generation]:
            begun = time.perf_counter()
            assert prompt is not None
            ids = asked_ids(runtime, prompt.render(row.prompt, row.history))
            made = runtime.generate(ids, longest, stop)
            return _seconds(place, begun, made.total_seconds), made

        energy = place.conditions().joules
        for row in rows:
            if cold is None:  # nothing is warm yet: this answer counts here alone
                first, _ = answered(row)
                cold = ready + first
            answers[row.id] = answered(row)
            task.advance()
        joules = spent(energy, place.conditions().joules)
        peak = 0 if place.clock == NONE else runtime.peak_memory_bytes()
        not_timed = {row.id: answered(row)[1].text for row in refused}
    return _Seen(ready, cold, more, answers, peak, joules, not_timed)


def _more(model: _Model, plan: Plan, place: Place, threads: int, number: int, task: Task) -> Rates:
    """It goes before the prompts: a context for which there is no memory is refused before they are
    answered, and what was measured until then stands without it."""
    found: Rates = {}
    for step in plan.more.steps(threads):
        try:
            found |= bench_step(model.asked.file, step, place, plan.runs)
        except RuntimeFailure as error:
            if not model.seen and not model.rated:
                raise
            what = LACKING.format(step.behind, number + 1, plan.processes, error.what)
            model.lacks.append(what)
        task.advance()
    return found


def _seconds(place: Place, since: float, told: float) -> float:
    """Since that moment by our clock, or what the device told where that is the place's clock."""
    return time.perf_counter() - since if place.clock == HERE else told


def _figures(model: _Model) -> dict[str, Measure]:
    """By name, each with its unit; see docs/bench.md."""
    seen, rated = model.seen, model.rated
    # One that has only loaded tells little of memory.
    largest: Sequence[_Seen | _Rated] = seen if seen[0].answers else rated
    figures = {
        **{n: measure([each.rates[n] for each in rated], "tokens/s") for n in rated[0].rates},
        **{n: measure(groups, "tokens/s") for n, groups in _by_name(seen).items()},
        "load": measure([[each.start_seconds] for each in seen], "s"),
        "peak_memory": measure([[each.peak_memory] for each in largest], "bytes"),
    }
    if not seen[0].answers:
        return figures
    spent_each = [each.joules for each in seen if each.joules is not None]
    if len(spent_each) == len(seen):  # a process answers its first prompt twice
        answers = len(seen[0].answers) + 1
        figures["energy_per_answer"] = measure([[joules / answers] for joules in spent_each], "J")
    figures["cold_start"] = measure([[each.cold_seconds or 0.0] for each in seen], "s")
    whole = [[seconds for seconds, _ in each.answers.values()] for each in seen]
    first = [
        [seconds - made.total_seconds + made.time_to_first_token for seconds, made in answers]
        for answers in (each.answers.values() for each in seen)
    ]
    between = [
        [tick for _, made in each.answers.values() for tick in made.token_seconds] for each in seen
    ]
    timed = {"end_to_end": whole, "time_to_first_token": first, "inter_token": between}
    timed["time_per_output_token"] = [
        [each for _, made in one.answers.values() if (each := _per_token(made)) is not None]
        for one in seen
    ]
    return figures | percentiles(timed)


def _by_name(seen: Sequence[_Seen]) -> dict[str, list[list[float]]]:
    """What was timed beside, of the processes that gave it."""
    names = dict.fromkeys(name for each in seen for name in each.more)
    return {name: [each.more[name] for each in seen if name in each.more] for name in names}


def percentiles(timed: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Measure]:
    """Seconds by name and group (process or pass) as figures; a name without a value in each group
    is left out."""
    return {
        f"{name}_{statistic}": measure(groups, "s", statistic)
        for name, groups in timed.items()
        if groups and all(groups)
        for statistic in ("p50", "p95", "p99")
    }


def _per_token(made: Generation) -> float | None:
    """Mean seconds of the tokens behind the first one, without what ends the answer."""
    behind = made.token_seconds[: len(made.ids) - 1] if made.ids else ()
    return sum(behind) / len(behind) if behind else None


def _likeness(
    plan: Plan, checker: Checker | None, seen: Sequence[_Seen], progress: Progress
) -> dict[str, Any] | None:
    """Of the first process' answers; those that were not the same, token by token, in all processes
    are counted."""
    prompts = plan.prompts
    if prompts is None:
        return None
    first = seen[0]
    given = [Given(row, first.answers[row.id][1].text) for row in prompts.rows]
    refused = [Given(row, first.refused[row.id]) for row in prompts.refused]
    unlike = sum(
        len({tuple(each.answers[row.id][1].ids) for each in seen}) > 1 for row in prompts.rows
    )
    return likeness_of(prompts, plan.check, checker, given, refused, unlike, plan.seed, progress)
