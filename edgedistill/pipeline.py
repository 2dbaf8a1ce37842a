"""The stages in order: from prompts and a teacher to a bundle for each target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Adapter,
    Bundle,
    Checkpoint,
    Dataset,
    Exported,
    Finished,
    Importance,
    Quantized,
    Report,
    Student,
    Traces,
    Variant,
    load_finished,
    require_writable,
)
from edgedistill.bench import bench, refusal, require_gates
from edgedistill.browser import package_files
from edgedistill.collect import collect
from edgedistill.combine import combine
from edgedistill.curate import curate
from edgedistill.errors import GateFailed
from edgedistill.export import export
from edgedistill.export.lora import export_lora, lora_base
from edgedistill.export.onnx import export_onnx
from edgedistill.export.optimum import export_optimum
from edgedistill.export.optimum_check import check_optimum
from edgedistill.feasible import possible_student
from edgedistill.fit import prove
from edgedistill.learning import learn_recipe
from edgedistill.merge import merge
from edgedistill.pack import pack, shipped_student, write_page
from edgedistill.pack.optimum import pack_optimum
from edgedistill.progress import Progress
from edgedistill.prune import prune
from edgedistill.quantize import quantize
from edgedistill.recipe import Recipe
from edgedistill.recorder import Recorder
from edgedistill.runtimes import ONNX
from edgedistill.student import prepare_student
from edgedistill.target import Target
from edgedistill.tokenmix import TokenMix, read_token_mix
from edgedistill.tuning import note_tuning
from edgedistill.variants import make_variant, weighed_for
from edgedistill.verify import verify
from edgedistill.verify.onnx import verify_onnx
from edgedistill.workspace import keeping, locked

SHARED = ("distill", "merge")  # no target shapes them: one that misses a gate misses it for all


@dataclass(frozen=True)
class Workspace:
    """Where stages and traces live (`root`), and where bundles go (`dist`)."""

    root: Path
    dist: Path


@dataclass(frozen=True)
class BuildResult:
    """What one target got: the manifest of every stage by name, and the report once measured."""

    target: Target
    stages: Mapping[str, Mapping[str, Any]]
    report: Mapping[str, Any] | None = None
    bundle: Bundle | None = None


def build(
    recipe: Recipe,
    targets: Sequence[Target],
    workspace: Workspace,
    progress: Progress,
    until: str = "pack",
    retry_failed: bool = False,
    layout: str = "gguf",
) -> list[BuildResult]:
    """Run every stage up to `until`; what is complete is reused.

    `layout` is of the export: "gguf" stands for what each target's runtime needs; "optimum" ends
    the build and has a bundle of its own.

    Raises:
        GateFailed: a hand-over or a figure broke its bound; everything made so far stays.
        EdgedistillError: see errors.py. Running again goes on where this stopped.
    """
    recipe = keeping(recipe, workspace.root)
    if until == "pack" or layout == "optimum":
        require_writable(workspace.dist)
    with locked(workspace.root):
        log = Recorder(progress)
        if until == "pack" and any(target.runtime == "wllama" for target in targets):
            package_files(log)  # without a network that is told now, not behind the training
        if layout == "optimum":
            return [
                optimum_stages(recipe, target, workspace, log, retry_failed) for target in targets
            ]
        return run_stages(recipe, targets, workspace, log, until, retry_failed)


def adapter_alone(
    recipe: Recipe, workspace: Workspace, progress: Progress, type: str = "F16"
) -> tuple[Adapter, Mapping[str, Finished]]:
    """Run the stages that end with the LoRA-only GGUF of `type`; the adapter, and each complete
    stage by its name.

    Raises:
        EdgedistillError: see errors.py. Running again goes on where this stopped.
    """
    require_writable(workspace.dist)
    with locked(workspace.root):
        log, out = Recorder(progress), workspace.root
        ready = prepared(recipe, out, log)
        assert ready is not None  # it ends early only when it is told to
        adapter = _distilled(recipe, ready, out, log, retry_failed=False)
        base = lora_base(recipe, ready.student, out, log)
        export_lora(adapter, ready.student, base, recipe.name, out, log, type)
        found = {name: load_finished(at, reused=True) for name, at in log.folders.items()}
        return adapter, {name: done for name, done in found.items() if done is not None}


def run_stages(
    recipe: Recipe,
    targets: Sequence[Target],
    workspace: Workspace,
    log: Recorder,
    until: str = "pack",
    retry_failed: bool = False,
    page: bool = True,
) -> list[BuildResult]:
    """`build` without its lock, which a plan (planning.py) does not take; without `page` a missed
    gate draws no report. A gate that one target misses keeps no other from being made; it is
    raised when all are done."""
    merged = _merged(recipe, workspace.root, log, until, retry_failed, targets)
    if merged is None or until == "merge":
        return [BuildResult(target, log.manifests()) for target in targets]
    started, results = dict[bool, _Started](), list[BuildResult]()
    missed: dict[str, GateFailed] = {}
    for target in targets:
        onnx = target.runtime == ONNX  # llama.cpp and wllama run one file
        try:
            if onnx not in started:
                started[onnx] = _export(recipe, onnx, merged, workspace.root, log.branch())
            made = _for_target(recipe, target, merged, started[onnx], workspace, until, page)
        except GateFailed as error:
            missed[target.name] = error
            if error.step in SHARED:
                break
        else:
            results.append(made)
    for made in results if missed else ():  # else the command's result lists them
        if made.bundle is not None:
            log.note(f"{made.target.name}: made, {made.bundle.folder}")
    if missed:
        raise _all_of(missed, len(targets) > 1)
    return results


def _all_of(missed: Mapping[str, GateFailed], named: bool) -> GateFailed:
    """The first, with what the others miss in its words."""
    first = next(iter(missed.values()))
    if named:
        first.what = "; ".join(f"target {name}: {error.what}" for name, error in missed.items())
    return first


def optimum_stages(
    recipe: Recipe, target: Target, workspace: Workspace, log: Recorder, retry_failed: bool = False
) -> BuildResult:
    """The merged checkpoint in optimum's layout; no target shapes it."""
    out, prompt = workspace.root, recipe.student
    merged = _merged(recipe, out, log, "merge", retry_failed)
    assert merged is not None  # it ends early only when it is told to
    made = export_optimum(merged.checkpoint, prompt, out, log)
    bound = recipe.gates.export_mean_kld
    check_optimum(merged.checkpoint, made, merged.dataset, prompt, bound, out, log)
    bundle = pack_optimum(recipe, made, merged.student, log.manifests(), workspace.dist, log)
    return BuildResult(target, log.manifests(), bundle=bundle)


def _merged(
    recipe: Recipe,
    out: Path,
    log: Progress,
    until: str,
    retry_failed: bool,
    targets: Sequence[Target] = (),
) -> _Merged | None:
    ready = prepared(recipe, out, log, until, retry_failed, targets)
    if ready is None:
        return None
    adapter = _distilled(recipe, ready, out, log, retry_failed)
    if until == "distill":
        return None
    checkpoint = merge(adapter, ready.student, out, log)
    return _Merged(**vars(ready), adapter=adapter, checkpoint=checkpoint)


def prepared(
    recipe: Recipe,
    out: Path,
    log: Progress,
    until: str = "distill",
    retry_failed: bool = False,
    targets: Sequence[Target] = (),
) -> Prepared | None:
    """The stages before the training; None where `until` is one of them."""
    mix = read_token_mix(recipe.prompts, recipe.sample)
    student = None
    if until not in ("collect", "curate"):
        student = possible_student(recipe, targets, mix, out, log)
    traces = collect(mix, recipe.teacher, recipe.collect, out, log, retry_failed=retry_failed)
    if until == "collect":
        return None
    dataset = curate(traces, mix, recipe.curate, recipe.check, out, log)
    if until == "curate":
        return None
    student = student or prepare_student(recipe.student, out, log, mix.entries)
    student = prune(student, dataset, recipe.student, out, log)
    return Prepared(mix, traces, dataset, student)


def _distilled(
    recipe: Recipe, ready: Prepared, out: Path, log: Progress, retry_failed: bool
) -> Adapter:
    traces, dataset, student = ready.traces, ready.dataset, ready.student
    note_tuning(recipe, dataset, student, out, log)
    adapter = learn_recipe(recipe, traces, dataset, student, out, log, retry_failed)
    return combine(adapter, recipe.merge, out, log)


def _export(recipe: Recipe, onnx: bool, made: _Merged, out: Path, log: Recorder) -> _Started:
    """What every target of one kind of runtime starts from: an export, checked."""
    prompt, bound = recipe.student, recipe.gates.export_mean_kld
    if onnx:
        exported = export_onnx(made.checkpoint, made.student, recipe.name, out, log)
        verify_onnx(made.checkpoint, exported, made.dataset, prompt, bound, out, log)
    else:
        exported = export(made.checkpoint, made.student, recipe.name, out, log)
        verify(made.checkpoint, exported, made.dataset, prompt, bound, out, log)
    return _Started(exported, log)


def _for_target(
    recipe: Recipe,
    target: Target,
    made: _Merged,
    started: _Started,
    workspace: Workspace,
    until: str,
    page: bool,
) -> BuildResult:
    if until == "export":
        return BuildResult(target, started.log.manifests())
    out, exported, log = workspace.root, started.exported, started.log.branch()
    logs = {spec.name: log.branch(f" of {spec.name}") for spec in target.allocations}
    merged = made.checkpoint, made.student, made.dataset
    variants = [
        make_variant(recipe, target, spec, *merged, out, logs[spec.name])
        for spec in target.allocations
    ]
    weighed = weighed_for(recipe, target, made.checkpoint, made.dataset, out, log)
    ready, refused = _Ready(exported, variants, logs, weighed), dict[str, str]()
    while True:
        # A list of its own for each: of a refused candidate nothing ships.
        best = _best(recipe, target, made, ready, refused, out, log.branch(), until)
        if best.report is None:
            return BuildResult(target, best.log.manifests())
        why = refusal(best.report)
        if not why or not best.quantized.others:
            break
        refused[best.quantized.format] = why
        log.note(f"held-out prompts refuse {best.quantized.format}: {why}; next: a larger one")
    return _gated(recipe, target, best, best.report, workspace, until, page)


def _best(
    recipe: Recipe,
    target: Target,
    made: _Merged,
    ready: _Ready,
    refused: Mapping[str, str],
    out: Path,
    log: Recorder,
    until: str,
) -> _Best:
    """The smallest candidate inside the gates that held-out prompts have not refused, measured on
    them."""
    exported, prompt, check = ready.exported, recipe.student, recipe.check
    quantized = quantize(
        exported, ready.variants, ready.weighed, made.dataset, prompt, check, target, out, log,
        refused,
    )  # fmt: skip
    variant = next((each for each in ready.variants if each.name == quantized.format), None)
    if variant is not None:
        log.folders |= ready.logs[variant.name].folders  # of the others nothing ships
        if variant.fitted:
            prove(variant, quantized, out, log)
    report = None
    if until != "quantize":
        report = bench(
            recipe, target, made.mix, made.traces, made.dataset, made.student, made.adapter,
            made.checkpoint, exported, variant, quantized, out, log,
        )  # fmt: skip
    return _Best(exported, quantized, shipped_student(made.student, variant), report, log)


def _gated(
    recipe: Recipe,
    target: Target,
    best: _Best,
    report: Report,
    workspace: Workspace,
    until: str,
    page: bool,
) -> BuildResult:
    """The bundle of a candidate.

    Raises:
        GateFailed: it is outside a bound, and its report is left.
    """
    log, shipped, files = best.log, best.shipped, (best.quantized, best.exported)
    try:
        require_gates(report)
    except GateFailed:
        if page:
            write_page(report, recipe, *files, shipped, log.manifests())
        raise
    bundle = None
    if until == "pack":
        dist = workspace.dist
        bundle = pack(recipe, target, report, *files, shipped, log.manifests(), dist, log)
    figures = json.loads(report.file.read_text("utf-8"))
    return BuildResult(target, log.manifests(), figures, bundle)


@dataclass(frozen=True)
class Prepared:
    """What a student learns from."""

    mix: TokenMix
    traces: Traces
    dataset: Dataset
    student: Student


@dataclass(frozen=True)
class _Merged:
    """What every export of a recipe starts from."""

    mix: TokenMix
    traces: Traces
    dataset: Dataset
    student: Student
    adapter: Adapter
    checkpoint: Checkpoint


@dataclass(frozen=True)
class _Started:
    """The export for one kind of runtime, and the list of stages up to there."""

    exported: Exported
    log: Recorder


@dataclass(frozen=True)
class _Ready:
    """What the candidates of a target are made of."""

    exported: Exported
    variants: Sequence[Variant]
    logs: Mapping[str, Recorder]
    weighed: Importance | None


@dataclass(frozen=True)
class _Best:
    """The candidate that is chosen, and what held-out prompts say of it."""

    exported: Exported
    quantized: Quantized
    shipped: Student
    report: Report | None
    log: Recorder
