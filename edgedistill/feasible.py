"""What a student cannot become, known before the teacher is asked."""

from __future__ import annotations

from collections.abc import Sequence

from edgedistill import machine
from edgedistill.allocations import AllocationSpec
from edgedistill.artifacts import Student
from edgedistill.errors import ArtifactError, ConfigError, TargetError
from edgedistill.families import is_own, known_names
from edgedistill.fit.allocation import cut, require_allocatable
from edgedistill.onnx_builder import refuse_unknown
from edgedistill.quantize import WITH_IMPORTANCE, weighs
from edgedistill.runtimes import ONNX
from edgedistill.target import Target
from edgedistill.tensors import read_layout
from edgedistill.trim import require_trimmable

# Of fitting, in fp32 and at least: the latent weights, those that compute, their gradients, Adam's
# two moments, and the student that they are compared with; with LoRA only start, values and that.
FIT_BYTES = {"full": 24, "lora": 12}


def asks_of_student(target: Target) -> bool:
    """Whether a target wants what not every student can be made into."""
    return bool(target.allocations) or target.runtime == ONNX or weighs(target)


def require_possible(student: Student, targets: Sequence[Target]) -> None:
    """Refuse before any work what targets ask for and this student cannot be made into.

    Raises:
        TargetError: names the target's wish, or a budget that no choice of types can meet, and
            the student.
    """
    try:
        _require(student, targets)
    except (ArtifactError, ConfigError) as error:
        raise TargetError(error.what, where=error.where, hint=error.hint) from error


def _require(student: Student, targets: Sequence[Target]) -> None:
    for target in targets:
        if target.runtime == ONNX:
            refuse_unknown(student.folder)
        if weighs(target) and not is_own(student.folder):
            raise ArtifactError(
                f"importance matrices are made of {known_names()} only, this student is another",
                where=str(student.folder),
                hint=f"leave the formats with {WITH_IMPORTANCE} out of target {target.name}",
            )
        for spec in target.allocations:
            try:
                _require_allocation(student, spec, target)
            except ArtifactError as error:
                where = f"target {target.name}: allocations.{spec.name}"
                raise ArtifactError(error.what, where=where, hint=error.hint) from error


def _require_allocation(student: Student, spec: AllocationSpec, target: Target) -> None:
    require_trimmable(student.folder, spec.vocabulary, spec.drop_layers)
    if not is_own(student.folder):
        raise ArtifactError(
            f"allocations are made of {known_names()} only, this student is another",
            hint=f"leave allocations out of target {target.name}; its formats work",
        )
    require_allocatable(student.folder, spec, target)
    require_memory(student, spec, target, machine.memory_bytes())


def require_memory(
    student: Student, spec: AllocationSpec, target: Target, there: int | None
) -> None:
    """Refuse a fitting that the system would kill, after everything before it was paid for.

    `there` is the memory of this machine in bytes; None: a GPU computes, and nothing is known.

    Raises:
        ArtifactError: tells what is needed at least.
    """
    if spec.fit is None or there is None:
        return
    weights = cut(read_layout(student.folder), spec).parameters
    needed = weights * FIT_BYTES[spec.fit.method]
    if needed > there:
        raise ArtifactError(
            f"fitting takes {needed / 1e9:.1f} GB of memory at least, and this machine has "
            f"{there / 1e9:.1f}",
            hint=f"leave fit out of this allocation in a copy of target {target.name}, or build "
            "where there is more memory or a GPU",
        )
