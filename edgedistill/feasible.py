"""What a student cannot become, known before the teacher is asked."""

from __future__ import annotations

from collections.abc import Sequence

from edgedistill.artifacts import Student
from edgedistill.errors import ArtifactError, ConfigError, TargetError
from edgedistill.families import is_own, known_names
from edgedistill.fit.allocation import require_allocatable
from edgedistill.onnx_builder import refuse_unknown
from edgedistill.quantize import WITH_IMPORTANCE, weighs
from edgedistill.runtimes import ONNX
from edgedistill.target import Target
from edgedistill.trim import require_trimmable


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
            require_trimmable(student.folder, spec.vocabulary, spec.drop_layers)
            if not is_own(student.folder):
                raise ArtifactError(
                    f"allocations are made of {known_names()} only, this student is another",
                    where=str(student.folder),
                    hint=f"leave allocations out of target {target.name}; its formats work",
                )
            require_allocatable(student.folder, spec, target)
