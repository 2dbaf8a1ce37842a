"""Quantize: make and measure each candidate of a target; the smallest inside its gates wins.

Everything is measured on validation rows, so that held-out figures stay untouched by the choice;
unless they refuse what was chosen, and it is asked again without that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Dataset,
    Exported,
    Identity,
    Importance,
    Quantized,
    Variant,
    run_stage,
    write_json,
)
from edgedistill.check_specs import Check
from edgedistill.footprint import memory_bytes
from edgedistill.progress import Progress
from edgedistill.quantize.bounds import (
    CANDIDATES,
    broken_bounds,
    none_passes,
)
from edgedistill.quantize.candidate import (
    WITH_IMPORTANCE,
    Baseline,
    Made,
    make_onnx,
    make_onnx_variant,
    make_stock,
    make_variant,
    measure_baseline,
)
from edgedistill.quantize.exam import Exam
from edgedistill.quantize.importance import weigh
from edgedistill.recipe import StudentSpec
from edgedistill.results import Candidate
from edgedistill.runtimes import ONNX, TRAITS, copy_model
from edgedistill.target import Target

__all__ = ["WITH_IMPORTANCE", "quantize", "weigh", "weighs"]


def weighs(target: Target) -> bool:
    """Whether a stock format of the target asks for an importance matrix."""
    return any(name.endswith(WITH_IMPORTANCE) for name in target.formats)


def quantize(
    exported: Exported,
    variants: Sequence[Variant],
    importance: Importance | None,
    dataset: Dataset,
    prompt: StudentSpec,
    check: Check,
    target: Target,
    out: Path,
    progress: Progress,
    refused: Mapping[str, str] | None = None,
) -> Quantized:
    """Stage "quantize": the winning file (for ONNX: folder), and `candidates.json` (a list of
    results.Candidate). `refused` tells of candidates, by name, why held-out prompts refuse them:
    they do not win.

    Before it, and shared by all targets: stage "baseline", and stage "candidate" for each format
    of the target and each of `variants`, its allocations.

    Raises:
        GateFailed: step "quantize": no candidate is inside the target's bounds;
            `candidates.json` stays in the unfinished folder.
        RuntimeFailure: a candidate cannot be made or run.
        MissingTool: what makes or runs it is not installed.
    """
    exam = Exam(dataset, prompt, check, target.runtime)
    baseline = measure_baseline(exported, exam, out, progress)
    made = [
        make_onnx(name, exported, target, baseline, exam, out, progress)
        if target.runtime == ONNX
        else make_stock(name, exported, importance, baseline, exam, out, progress)
        for name in target.formats
    ]
    made += [
        make_onnx_variant(variant, exported, target, baseline, exam, out, progress)
        if target.runtime == ONNX
        else make_variant(variant, baseline, exam, out, progress)
        for variant in variants
    ]
    identity = Identity(
        stage="quantize",
        version=5,
        spec={
            "target": _target_spec(target),
            # Other bounds hold for them; a fitting that kept its start may make the same file.
            "fitted": sorted(each.name for each in made if each.fitted),
            **({"refused": dict(refused)} if refused else {}),
        },
        inputs={
            "baseline": baseline.digest,
            **{f"candidate {each.name}": each.digest for each in made},
        },
    )

    def work(folder: Path) -> Mapping[str, Any]:
        return _chosen(made, baseline, target, refused or {}, folder, progress)

    done = run_stage(identity, out, progress, work)
    model, others = done.folder / done.facts["file"], done.facts["others"]
    return Quantized(done.folder, done.digest, model, done.facts["format"], others)


def _chosen(
    made: Sequence[Made],
    baseline: Baseline,
    target: Target,
    refused: Mapping[str, str],
    folder: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    measured = [_judged(each, baseline, target, refused.get(each.name, "")) for each in made]
    best = min((c for c in measured if c.passed), key=lambda c: (c.bytes, c.mean_kld), default=None)
    table = [replace(c, chosen=c is best) for c in measured]
    write_json(folder / CANDIDATES, [asdict(c) for c in table])
    if best is None:
        raise none_passes(table, target, folder)
    for c in table if not refused else ():  # told before, when none was
        figures = f"{c.bytes / 1e6:.1f} MB, agreement {c.agreement:.1%}, mean KLD {c.mean_kld:.2g}"
        progress.note(f"{c.format}: {figures}; {'out: ' + c.why_not if c.why_not else 'inside'}")
    source = next(each for each in made if each.name == best.format)
    # By its name here: another target may have made the same candidate under another one.
    copy_model(source.file, folder / source.own_name)
    progress.note(
        f"chosen: {best.format}, the smallest of {sum(c.passed for c in table)} inside the gates "
        f"of target {target.name} ({best.bytes / 1e6:.1f} MB)"
    )
    formula = TRAITS[target.runtime].memory_formula
    return {
        "file": source.own_name,
        "format": best.format,
        "others": sum(c.passed for c in table) - 1,
        "memory_formula": formula,
    }


def _judged(made: Made, baseline: Baseline, target: Target, refused: str) -> Candidate:
    found, size = made.figures, int(made.figures["bytes"])
    candidate = Candidate(
        format=made.name,
        bytes=size,
        bits_per_weight=round(size * 8 / made.shape.parameters, 3),
        mean_kld=found["mean_kld"],
        p99_kld=found["p99_kld"],
        top1=found["top1"],
        agreement=found["agreement"],
        agreement_before=baseline.agreement,
        estimated_memory_bytes=memory_bytes(size, made.shape, target),
        passed=False,
        why_not="",
        chosen=False,
        fitted=made.fitted,
        nll=found["nll"],
        nll_before=baseline.nll,
        refused=refused,
    )
    broken = [b.text for b in broken_bounds(candidate, target)]
    if refused:
        broken.append(f"held-out prompts: {refused}")
    return replace(candidate, passed=not broken, why_not="; ".join(broken))


def _target_spec(target: Target) -> dict[str, Any]:
    """What of a target decides which file wins; a speed gate is held later, in bench."""
    shown = {"formats", "context_tokens", "memory_budget_mb", "gates"}
    spec = target.model_dump(mode="json", include=shown)
    spec["gates"].pop("min_tokens_per_second")
    return spec
