"""What the candidates of a target are made of, beside the export that all of them share."""

from __future__ import annotations

from pathlib import Path

from edgedistill.allocations import AllocationSpec
from edgedistill.artifacts import Checkpoint, Dataset, Importance, Student, Variant
from edgedistill.distill import with_precision
from edgedistill.export import export
from edgedistill.fit import allocate, fit, measure_sensitivity
from edgedistill.progress import Progress
from edgedistill.quantize import weigh, weighs
from edgedistill.recipe import Recipe
from edgedistill.target import Target
from edgedistill.tensors import Encoding
from edgedistill.trim import kept_tokens, trim, trim_alike


def weighed_for(
    recipe: Recipe, target: Target, merged: Checkpoint, data: Dataset, out: Path, log: Progress
) -> Importance | None:
    """The importance matrix for stock formats that ask for one."""
    return weigh(merged, data, recipe.student, out, log) if weighs(target) else None


def make_variant(
    recipe: Recipe,
    target: Target,
    spec: AllocationSpec,
    merged: Checkpoint,
    student: Student,
    data: Dataset,
    out: Path,
    log: Progress,
) -> Variant:
    """The student made ready for one allocation: trimmed, allocated, fitted, exported."""
    prompt = recipe.student
    whole = start = merged
    if spec.vocabulary is not None:
        whole = start = trim(whole, data, prompt, spec.vocabulary, 0, out, log)
    if spec.drop_layers:
        start = trim(whole, data, prompt, None, spec.drop_layers, out, log)
    searched = spec.importance and not spec.onnx  # ONNX formats have no search to weigh
    weighed = weigh(start, data, prompt, out, log) if searched else None
    costs = None
    if len(spec.types) > 1:
        types = {*spec.types, *([spec.embedding] if spec.embedding else [])}
        costs = measure_sensitivity(start, data, prompt, sorted(types), weighed, out, log)
    trimmed = None if start is merged else start
    allocation = allocate(start, costs, weighed, spec, target, out, log)
    fitted = None
    if spec.fit is not None:
        lesson = with_precision(data, student, prompt, recipe.distill, out, log)
        begin = start
        if spec.fit.start == "student":
            base = Checkpoint(student.folder, student.digest)
            begin = base if trimmed is None else trim_alike(base, trimmed, out, log)
        fitted = fit(
            begin, whole, allocation, data, prompt, lesson, spec.fit, recipe.check, out, log
        )
        start = fitted or start
    encoding: Encoding = "F32" if fitted else "F16"
    exported = None
    if not spec.onnx:
        exported = export(start, student, recipe.name, out, log, encoding)
    kept = kept_tokens(start.folder)
    return Variant(spec.name, start, trimmed, allocation, exported, fitted is not None, kept)
