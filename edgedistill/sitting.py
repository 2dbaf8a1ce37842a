"""One sitting: a model file measured at a place, into a Result.

It is loaded in several processes one behind the other, since two processes differ by more than two
runs of one; each asks the prompts in an order of its own. Other work on the machine is listened to
before and counted throughout, so that a disturbed figure is told from a slow one.
"""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.check_specs import Check
from edgedistill.checks import Checker, check_identity
from edgedistill.collect import collect
from edgedistill.conditions import changes, spent
from edgedistill.curate import curate, read_refused
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import EvalRow, read_rows, shuffled
from edgedistill.likeness import Given, likeness_of, notes_of, ready_checker
from edgedistill.load_watch import BUSY_SHARE, Load, warn_of
from edgedistill.measures import Measure, measure
from edgedistill.model_prompt import Asked, model_facts
from edgedistill.places import HERE, NONE, THERE, Here, Place
from edgedistill.progress import Progress, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.rates import PREFILL_TOKENS, More, bench, bench_more, require_cores, require_depths
from edgedistill.reached import reached
from edgedistill.recipe import CurateSpec, Recipe
from edgedistill.result_file import Result
from edgedistill.runtime import Generation
from edgedistill.runtimes import asked_ids
from edgedistill.tokenmix import TokenMix, read_token_mix
from edgedistill.workspace import locked

SHORT_CONTEXT = 256
NO_MORE = More()
CLOCKS = {  # what a result says of its seconds
    HERE: (),
    THERE: ("seconds are the device's own, without rendering, tokenizing and the way to it",),
    NONE: ("emulated: nothing was timed, and its answers alone tell of the device",),
}
UNJUDGED = "the answers are in the result, but not judged: no check; give --recipe NAME"
REFUSED_AT_MOST = 100  # prompts that the teacher refuses, asked beside the others


@dataclass(frozen=True)
class Prompts:
    """What is asked; `digest` is over all of it. A row's `answer` is the teacher's, "" where none
    is known. `dataset` is the digest of that whose held-out prompts these are, all of them. `tags`
    go by prompt ID; `refusals` are how refusals start. `refused` are prompts that the teacher
    refuses, with what it says: each is asked once, and not timed."""

    source: str
    digest: str
    rows: Sequence[EvalRow]
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    refusals: Sequence[str] = CurateSpec().refusals
    refused: Sequence[EvalRow] = ()
    dataset: str | None = None


def prompts_of(file: Path, sample: int | None) -> Prompts:
    """The prompts of a file, or so many of them.

    Raises:
        TokenMixError: they cannot be read.
    """
    mix = read_token_mix(file, sample, "--prompts names it, relative to the folder you are in")
    return Prompts(file.name, mix.digest, [_row(each, "") for each in mix.entries], _tags(mix))


def _row(entry: TokenMixEntry, answer: str) -> EvalRow:
    return EvalRow(
        id=entry.id,
        prompt=entry.prompt,
        answer=answer,
        phrasing="",
        seen=False,
        reference=entry.reference,
        history=entry.messages[:-1],
    )


def _tags(mix: TokenMix) -> dict[str, Sequence[str]]:
    return {entry.id: entry.tags for entry in mix.entries if entry.tags}


def held_out_of(recipe: Recipe, sample: int | None, root: Path, progress: Progress) -> Prompts:
    """A recipe's held-out prompts, or so many of them: on prompts that a student has learnt it
    looks better than it is. What the workspace `root` lacks of the teacher's answers is asked.

    Raises:
        TeacherError: that fails. DatasetError: too few answers are left.
    """
    with locked(root):
        mix = read_token_mix(recipe.prompts, recipe.sample)
        traces = collect(mix, recipe.teacher, recipe.collect, root, progress)
        dataset = curate(traces, mix, recipe.curate, recipe.check, root, progress)
    rows = _drawn(read_rows(dataset.folder / "held_out.jsonl"), sample)
    said = read_refused(dataset.folder / "rejected.jsonl")
    refused = [_row(each, said[each.id]) for each in mix.entries if each.id in said]
    return Prompts(
        source=f"held-out prompts of {recipe.name}",
        digest=digest_of([asdict(row) for row in rows]),
        rows=rows,
        dataset=dataset.digest if sample is None else None,
        tags=_tags(mix),
        refusals=recipe.curate.refusals,
        refused=_drawn(refused, min(REFUSED_AT_MOST, sample or REFUSED_AT_MOST)),
    )


def _drawn(rows: Sequence[EvalRow], sample: int | None) -> Sequence[EvalRow]:
    """So many of them, in their order; which, the IDs alone decide."""
    if sample is None:
        return rows
    chosen = {row.id for row in sorted(rows, key=lambda row: shuffled(row.id, 0))[:sample]}
    return [row for row in rows if row.id in chosen]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    processes: int = 3
    runs: int = 3  # of pp512 and tg128, in each process
    threads: int | None = None
    more: More = NO_MORE
    prompts: Prompts | None = None
    check: Check | None = None
    seed: int = 0


@dataclass
class _Seen:
    """What one process gave."""

    start_seconds: float
    cold_seconds: float | None
    rates: dict[str, list[float]]
    answers: dict[str, tuple[float, Generation]]  # by prompt ID: seconds with tokenization
    peak_memory: int
    joules: float | None  # spent while the prompts were answered, where the device tells it
    refused: dict[str, str]  # answers to prompts that the teacher refuses, of the first process


def sit(asked: Asked, plan: Plan, progress: Progress, place: Place | None = None) -> Result:
    """Measure a model file at `place`, or here.

    Raises:
        RuntimeFailure: the runtime refuses it. WeightsError: it has no prompt that can be used.
        UsageError: a depth is beyond its context, or there are more threads than cores.
        TeacherError: the judge of the check cannot be asked.
    """
    require_depths(asked.file, plan.more.depths)
    checker = None if plan.prompts is None else ready_checker(plan.check)
    place = place or Here()
    device, model = place.facts(), model_facts(asked)
    require_cores([plan.threads or 1, *plan.more.threads], device["usable_cores"])
    threads = plan.threads or device["threads"]
    rows = plan.prompts.rows if plan.prompts is not None else []
    prompt = asked.prompt() if rows else None
    with progress.task(f"listening to other work ({place.address})", None):
        watch, before = place.watch(), place.conditions()
    warn_of(watch.before, progress)
    seen = []
    with progress.task(
        "measuring", plan.processes * (len(rows) + 1 + plan.more.steps), "steps"
    ) as task:
        for number in range(plan.processes):
            seen.append(_process(asked, plan, place, prompt, threads, number, task))
    load, after = watch.stop(), place.conditions()
    figures = {} if place.clock == NONE else _figures(seen)
    roofline, unknown = _roofline(asked, place, threads, figures, progress)
    likeness = _likeness(plan, checker, seen, progress)
    return Result(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        edgedistill=__version__,
        model=model,
        device={"address": place.address, **device, "runtime": place.runtime(asked.file)},
        load={**asdict(load), "busy": load.busy},
        conditions={"before": asdict(before), "after": asdict(after), **changes(before, after)},
        settings={
            "processes": plan.processes, "runs": plan.runs, "threads": threads, "seed": plan.seed,
            "depths": list(plan.more.depths), "thread_counts": list(plan.more.threads),
            "max_tokens": asked.spec.max_tokens, "system": asked.spec.system,
        },
        figures=figures,
        token_mix=mix_facts(plan.prompts),
        check=None if plan.check is None else check_identity(plan.check),
        likeness=likeness,
        roofline=roofline,
        notes=[*CLOCKS[place.clock], *_notes(plan, load, likeness, place), *unknown],
    )  # fmt: skip


def _roofline(
    asked: Asked, place: Place, threads: int, figures: Mapping[str, Measure], progress: Progress
) -> tuple[dict[str, Any] | None, list[str]]:
    """The ceilings and what was reached of them, or a note on why they are not known: what was
    measured before stands without them."""
    try:
        with progress.task("measuring memory and arithmetic", None):
            ceilings = place.ceilings(threads)
            return None if ceilings is None else reached(asked.file, figures, ceilings), []
    except RuntimeFailure as error:
        return None, [f"the device's ceilings are not known: {error.what}"]


def _notes(plan: Plan, load: Load, likeness: Mapping[str, Any] | None, place: Place) -> list[str]:
    notes = []
    if load.busy:
        notes.append(
            f"other work took {load.others:.0%} of this machine's "
            f"processor time (more than {BUSY_SHARE:.0%}): these figures are no measure of it"
        )
    if load.busy is None and place.clock != NONE:
        notes.append("the device does not tell whether other work disturbed these figures")
    if likeness is not None and likeness["unlike"]:
        notes.append(f"{likeness['unlike']} answers were not the same in all processes")
    if plan.prompts is not None and plan.check is None:
        notes.append(UNJUDGED)
    return notes + notes_of(likeness)


def _process(
    asked: Asked,
    plan: Plan,
    place: Place,
    prompt: StudentPrompt | None,
    threads: int,
    number: int,
    task: Task,
) -> _Seen:
    rows = list(plan.prompts.rows) if plan.prompts is not None else []
    random.Random(f"{plan.seed}-{number}").shuffle(rows)
    longest = asked.spec.max_tokens
    refused = plan.prompts.refused if plan.prompts is not None and number == 0 else ()
    context = SHORT_CONTEXT
    if prompt is not None:
        lengths = [len(prompt.prompt_ids(row.prompt, row.history)) for row in (*rows, *refused)]
        context = max(SHORT_CONTEXT, max(lengths) + longest)
    started, cold, answers = time.perf_counter(), None, {}
    with place.open(asked.file, threads=threads, context_tokens=context) as model:
        ready = _seconds(place, started, model.facts.get("load_seconds", 0.0))
        stop = model.end_ids()

        def answered(row: EvalRow) -> tuple[float, Generation]:
            begun = time.perf_counter()
            assert prompt is not None
            ids = asked_ids(model, prompt.render(row.prompt, row.history))
            made = model.generate(ids, longest, stop)
            return _seconds(place, begun, made.total_seconds), made

        energy = place.conditions().joules
        for row in rows:
            if cold is None:  # nothing is warm yet: this answer counts here alone
                first, _ = answered(row)
                cold = _seconds(place, started, ready + first)
            answers[row.id] = answered(row)
            task.advance()
        joules = spent(energy, place.conditions().joules)
        peak = 0 if place.clock == NONE else model.peak_memory_bytes()
        not_timed = {row.id: answered(row)[1].text for row in refused}
        if place.clock == NONE:
            return _Seen(ready, cold, {}, answers, peak, None, not_timed)
    with place.open(asked.file, threads=threads, context_tokens=PREFILL_TOKENS) as model:
        rates = bench(model, plan.runs)
        peak = peak if rows else model.peak_memory_bytes()  # one that has only loaded tells little
    task.advance()
    rates |= bench_more(asked.file, plan.more, place, threads, plan.runs, task.advance)
    return _Seen(ready, cold, rates, answers, peak, joules, not_timed)


def _seconds(place: Place, since: float, told: float) -> float:
    """Since that moment by our clock, or what the device told where that is the place's clock."""
    return time.perf_counter() - since if place.clock == HERE else told


def _figures(seen: Sequence[_Seen]) -> dict[str, Measure]:
    """By name, each with its unit; see docs/bench.md."""
    figures = {
        **{n: measure([each.rates[n] for each in seen], "tokens/s") for n in seen[0].rates},
        "load": measure([[each.start_seconds] for each in seen], "s"),
        "peak_memory": measure([[each.peak_memory] for each in seen], "bytes"),
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


def mix_facts(prompts: Prompts | None) -> dict[str, Any] | None:
    """What was asked, as a result has it."""
    if prompts is None:
        return None
    return {
        "source": prompts.source, "digest": prompts.digest, "prompts": len(prompts.rows),
        "dataset": prompts.dataset,
    }  # fmt: skip
