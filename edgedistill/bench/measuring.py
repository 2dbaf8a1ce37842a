"""The work of the bench stage: measure one build and write down what was found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.artifacts import RESUME, load_finished, write_atomic, write_json
from edgedistill.bench import REPORT, Build, emulated
from edgedistill.bench.agreement import Answers, Same, agreement, answer_all, examples, judge
from edgedistill.bench.chain import Change, Step, drop, link, measure_chain, steps_of
from edgedistill.bench.device import OnDevice, Seen, on_device, untried
from edgedistill.bench.gates import refused_by, with_clock, without_clock
from edgedistill.bench.models import (
    Model,
    context_needed,
    device_model,
    supervised,
    torch_model,
)
from edgedistill.bench.unquantized import Unquantized, followed, held_out, unquantized_models
from edgedistill.checks import Checker, make_checker, thrown_by
from edgedistill.fidelity import EvalRow, rows_that_fit
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.results import (
    Agreement,
    BenchResult,
    Candidate,
    Gate,
    Link,
    TrainingPoint,
)
from edgedistill.runtimes import size_of

FIDELITY, ANSWERS = "fidelity.json", "answers.jsonl"
# The fields of a BenchResult that depend neither on the clock nor on the machine.
CLOCKED = ("browser", "bench")  # steps whose gates depend on one of them
CLOCKLESS = (
    "recipe", "target", "check", "teacher_model", "student_base", "model_bytes", "format",
    "counts", "rejected", "agreements", "links", "candidates", "training", "fitting",
    "fitted_step", "examples",
)  # fmt: skip
# Of the training's facts, those that the report tells.
TRAINED = (
    "steps", "device", "gpu", "processes", "precision", "trained_parameters", "tokens_per_second",
    "step_seconds", "evaluation_seconds", "part_tokens", "gradient_checkpointing",
    "estimated_bytes", "gpu_peak_memory_bytes", "model_flops_utilisation",
)  # fmt: skip


def measure_build(
    build: Build, shared: Unquantized, folder: Path, out: Path, progress: Progress
) -> Mapping[str, Any]:
    """Write report.json, fidelity.json and answers.jsonl into `folder`; the facts of the stage."""
    rows, resume = held_out(build), folder / RESUME
    shared.lay_out(resume)
    prompt = StudentPrompt(build.checkpoint.folder, build.recipe.student)
    own, longest = _own_prompt(build), build.recipe.student.max_tokens
    # A trimmed vocabulary writes rare words in more tokens.
    needed = max(context_needed(each, rows, longest) for each in (prompt, own))
    context = max(needed, build.target.context_tokens)
    models, steps = _models(build, prompt, context), steps_of(build.variant)
    changes, notes = _changes(build, models, steps, rows, prompt, resume, progress)
    answers = answer_all(models, rows, followed(models, resume), resume, progress)
    checker = make_checker(build.recipe.check)
    same = {name: judge(checker, rows, given) for name, given in answers.items()}
    notes += threw(checker)
    spec = build.recipe.bench
    agreements = [
        agreement(name, rows, flags, spec.bootstrap, spec.seed) for name, flags in same.items()
    ]
    links = _links(build, steps, changes, agreements)
    early = _still_gates(build, links, agreements)
    seen = Seen(build, rows, own, context, answers["quantized"], same["quantized"], checker)
    # A refused file does not ship, so nobody needs its times.
    given_up = bool(build.quantized.others and refused_by(early))
    found = untried() if given_up else on_device(seen, models[-1], out, resume, progress)
    links, notes = links + found.links, notes + found.notes
    if needed > build.target.context_tokens:
        notes.append(
            f"the target plans {build.target.context_tokens} context tokens; the longest held-out "
            f"prompt with a full answer needs {needed}, and was measured with that many"
        )
    shown = examples(rows, answers["quantized"], same["quantized"], spec.examples)
    result = _result(build, checker.description, agreements, links, found, shown, notes)
    _write(folder, result, rows, answers, same)
    return _facts(result, folder)


def _models(build: Build, prompt: StudentPrompt, context: int) -> list[Model]:
    """Base, adapter, merged, exported, what an allocation adds, quantized: in this order they are
    measured and shown."""
    target, longest = build.target, build.recipe.student.max_tokens
    own, added = _own_prompt(build), []
    # Nothing is timed here, and more threads than cores wait for each other.
    threads = None if target.threads is None else emulated.threads(target)
    if (variant := build.variant) is not None:
        if variant.trimmed is not None:
            added.append(torch_model("trimmed", variant.trimmed.folder, own, longest))
        if variant.fitted:
            folder, values = variant.checkpoint.folder, build.quantized.model
            added.append(torch_model("fitted", folder, own, longest, values=values))
    shipped = device_model(
        "quantized",
        target.runtime,
        build.quantized.model,
        own,
        longest,
        threads=threads,
        context_tokens=context,
    )
    return [*unquantized_models(build, prompt, context, threads), *added, shipped]


def _changes(
    build: Build,
    models: Sequence[Model],
    steps: Sequence[Step],
    rows: Sequence[EvalRow],
    prompt: StudentPrompt,
    resume: Path,
    progress: Progress,
) -> tuple[dict[str, Change], list[str]]:
    alike = _cut_alike(build, rows, prompt)
    fitting = rows_that_fit(alike, prompt)
    notes = []
    if len(alike) < len(rows):
        notes.append(
            f"{len(rows) - len(alike)} of {len(rows)} held-out prompts are cut into other tokens "
            "by the trimmed vocabulary: they count for agreement, not for KLD"
        )
    if len(fitting) < len(alike):
        notes.append(
            f"KLD is over {len(fitting)} of {len(alike)} held-out prompts: the logits of more do "
            "not fit into 2 GB of scratch space a model"
        )
    by_name = {model.name: model for model in models}
    return measure_chain(by_name, fitting, resume, progress, steps), notes


def _cut_alike(build: Build, rows: Sequence[EvalRow], prompt: StudentPrompt) -> list[EvalRow]:
    """Rows that a trimmed vocabulary cuts into the same tokens as the whole one does."""
    variant = build.variant
    if variant is None or variant.kept_tokens is None:
        return list(rows)
    own, before = _own_prompt(build), variant.kept_tokens
    return [
        row
        for row in rows
        if [before[i] for i in supervised(own, row)[0]] == supervised(prompt, row)[0]
    ]


def _links(
    build: Build,
    steps: Sequence[Step],
    changes: Mapping[str, Change],
    agreements: Sequence[Agreement],
) -> list[Link]:
    shares = {item.model: item.overall.value for item in agreements}
    gates = build.recipe.gates, build.target.gates
    return [link(step, changes[step.name], shares, *gates) for step in steps]


def _own_prompt(build: Build) -> StudentPrompt:
    """The prompt of what ships, whose vocabulary may be trimmed."""
    variant = build.variant
    folder = build.checkpoint.folder if variant is None else variant.checkpoint.folder
    return StudentPrompt(folder, build.recipe.student)


def _still_gates(
    build: Build, links: Sequence[Link], agreements: Sequence[Agreement]
) -> list[Gate]:
    """All gates but those on the clock and on a browser."""
    recipe, target, quantized = build.recipe, build.target, build.quantized
    shares = {item.model: item.overall.value for item in agreements}
    in_all = None if build.variant is None else drop(shares["exported"], shares["quantized"])
    candidates, size = _candidates(quantized.folder), size_of(quantized.model)
    return without_clock(recipe.gates, target, shares["merged"], links, candidates, size, in_all)


def _result(
    build: Build,
    check: str,
    agreements: list[Agreement],
    links: list[Link],
    found: OnDevice,
    shown: list[Any],
    notes: list[str],
) -> BenchResult:
    recipe, target, quantized, speed = build.recipe, build.target, build.quantized, found.speed
    candidates, page = _candidates(quantized.folder), found.page
    still = _still_gates(build, links, agreements)
    return BenchResult(
        recipe=recipe.name,
        target=target.name,
        description=recipe.description,
        machine=machine.facts(),
        check=check,
        teacher_model=recipe.teacher.model,
        student_base=build.student.title,
        model_file=quantized.model.name,
        model_bytes=size_of(quantized.model),
        format=quantized.format,
        counts=_counts(build),
        rejected=_rejected(build.dataset.folder),
        agreements=agreements,
        links=links,
        candidates=candidates,
        training=_training(build.adapter.folder),
        trained=_trained(build.adapter.folder),
        latency_kind=target.latency,
        latencies=speed.latencies,
        speedup_p50=speed.speedup_p50,
        llama_bench=speed.llama_bench,
        estimate=found.estimate,
        examples=shown,
        gates=still + with_clock(target, speed.llama_bench) + (page.gates if page else []),
        notes=notes + _told(candidates),
        in_browser=page.step if page else None,
        **_fitting(build),
    )


def threw(checker: Checker) -> list[str]:
    """On how many answers a check of the user's own threw."""
    thrown = thrown_by(checker)
    return [
        f"the check threw on {len(thrown)} answers, which count as not the same; the first, "
        f"{answer[:60]!r}: {what}"
        for answer, what in [*thrown.items()][:1]
    ]


def _told(candidates: Sequence[Candidate]) -> list[str]:
    """That held-out prompts had a say in the choice."""
    return [
        f"{each.format} ({each.bytes / 1e6:.1f} MB) was smaller, and these held-out prompts "
        f"refused it: {each.refused}. So they had a say in the choice, and flatter what ships"
        for each in candidates
        if each.refused
    ]


def _counts(build: Build) -> dict[str, int]:
    traces, data = build.traces, build.dataset
    return {
        "prompts": traces.answered + traces.failed,
        "answered": traces.answered,
        "failed": traces.failed,
        "rejected": data.rejected - traces.failed,
        "train": data.train,
        "validation": data.validation,
        "held_out": data.held_out,
    }


def _rejected(folder: Path) -> dict[str, int]:
    """Rejected answers by reason, most frequent first; a call that failed gave no answer."""
    with (folder / "rejected.jsonl").open(encoding="utf-8") as stream:
        reasons = Counter(json.loads(line)["reason"] for line in stream)
    del reasons["failed"]
    return dict(reasons.most_common())


def _candidates(folder: Path) -> list[Candidate]:
    entries = json.loads((folder / "candidates.json").read_text("utf-8"))
    return [Candidate(**entry) for entry in entries]


def _training(folder: Path) -> list[TrainingPoint]:
    points = json.loads((folder / "training.json").read_text("utf-8"))
    return [TrainingPoint(**point) for point in points]


def _trained(folder: Path) -> dict[str, Any]:
    """Of the run that made an adapter: device, rate, memory; as far as its stage has them."""
    done = load_finished(folder, reused=True)
    if done is None:
        return {}
    facts = {name: done.facts[name] for name in TRAINED if name in done.facts}
    return {**facts, "peak_memory_bytes": done.manifest["peak_memory_bytes"]}


def _fitting(build: Build) -> dict[str, Any]:
    variant = build.variant
    if variant is None or not variant.fitted:
        return {}
    folder = variant.checkpoint.folder
    done = load_finished(folder, reused=True)
    assert done is not None, "the variant is of a complete stage"
    return {"fitting": _training(folder), "fitted_step": done.facts["chosen_step"]}


def _write(
    folder: Path,
    result: BenchResult,
    rows: Sequence[EvalRow],
    answers: Mapping[str, Answers],
    same: Mapping[str, Same],
) -> None:
    report = result.to_json()
    write_json(folder / REPORT, report)
    fidelity = {name: report[name] for name in CLOCKLESS}
    fidelity["gates"] = [gate for gate in report["gates"] if gate["step"] not in CLOCKED]
    write_json(folder / FIDELITY, fidelity)
    lines = [
        json.dumps(
            {
                "id": row.id,
                "prompt": row.prompt,
                "seen_phrasing": row.seen,
                "teacher": row.answer,
                "answers": {name: given[row.id] for name, given in answers.items()},
                "same": {name: flags[row.id] for name, flags in same.items()},
            },
            ensure_ascii=False,
        )
        for row in rows
    ]
    write_atomic(folder / ANSWERS, "".join(f"{line}\n" for line in lines).encode())


def _facts(result: BenchResult, folder: Path) -> dict[str, Any]:
    """What the manifest shows at a glance."""
    return {
        "format": result.format,
        "agreement": {item.model: item.overall.value for item in result.agreements},
        "latency_kind": result.latency_kind,
        "speedup_p50": result.speedup_p50,
        "gates_failed": [f"{g.step}: {g.name}" for g in result.gates if not g.passed],
    }
