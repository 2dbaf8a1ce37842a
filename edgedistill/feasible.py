"""What a student cannot become, known before the teacher is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgedistill import machine
from edgedistill.allocations import AllocationSpec
from edgedistill.artifacts import Student
from edgedistill.errors import ArtifactError, ConfigError, TargetError
from edgedistill.families import is_own, known_names
from edgedistill.fit.allocation import cut, require_allocatable
from edgedistill.onnx_builder import refuse_unknown
from edgedistill.progress import Progress
from edgedistill.prune import require_prunable
from edgedistill.quantize import WITH_IMPORTANCE, weighs
from edgedistill.recipe import Recipe
from edgedistill.runtimes import ONNX
from edgedistill.student import prepare_student
from edgedistill.target import Target
from edgedistill.tensors import read_layout
from edgedistill.tokenmix import TokenMix
from edgedistill.trim import require_trimmable
from edgedistill.weights import folder_or_hub


def possible_student(
    recipe: Recipe, targets: Sequence[Target], mix: TokenMix, out: Path, log: Progress
) -> Student | None:
    """The student, held against what the recipe and the targets ask of it before the teacher is
    asked, whose calls may cost money; None where they ask nothing of a model known to be sound.

    Raises:
        TargetError: see `require_possible` and `require_prunable`. WeightsError: no student.
    """
    spec = recipe.student
    asked = any(asks_of_student(target) for target in targets)
    if not asked and spec.prune is None and folder_or_hub(spec.weights) is None:
        return None
    student = prepare_student(spec, out, log, mix.entries)
    require_prunable(student, spec)
    dropped = 0 if spec.prune is None else spec.prune.drop_layers
    require_possible(student, targets, dropped)
    for told in scarce_memory(student, targets, machine.memory_bytes(), dropped):
        log.note(told)
    return student


def asks_of_student(target: Target) -> bool:
    """Whether a target wants what not every student can be made into."""
    return bool(target.allocations) or target.runtime == ONNX or weighs(target)


def require_possible(student: Student, targets: Sequence[Target], pruned: int = 0) -> None:
    """Refuse before any work what targets ask for and this student cannot be made into, once
    `pruned` of its layers are gone.

    Raises:
        TargetError: names the target's wish, or a budget that no choice of types can meet, and
            the student.
    """
    try:
        _require(student, targets, pruned)
    except (ArtifactError, ConfigError) as error:
        raise TargetError(error.what, where=error.where, hint=error.hint) from error


def _require(student: Student, targets: Sequence[Target], pruned: int) -> None:
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
                _require_allocation(student, _with(spec, pruned), target)
            except ArtifactError as error:
                where = f"target {target.name}: allocations.{spec.name}"
                where += f" behind student.prune ({pruned} layers)" if pruned else ""
                raise ArtifactError(error.what, where=where, hint=error.hint) from error


def _with(spec: AllocationSpec, pruned: int) -> AllocationSpec:
    """An allocation of a pruned student asks the whole one for so many layers less."""
    return spec.model_copy(update={"drop_layers": spec.drop_layers + pruned}) if pruned else spec


def _require_allocation(student: Student, spec: AllocationSpec, target: Target) -> None:
    require_trimmable(student.folder, spec.vocabulary, spec.drop_layers)
    if not is_own(student.folder):
        raise ArtifactError(
            f"allocations are made of {known_names()} only, this student is another",
            hint=f"leave allocations out of target {target.name}; its formats work",
        )
    require_allocatable(student.folder, spec, target)


def scarce_memory(
    student: Student, targets: Sequence[Target], there: int | None, pruned: int = 0
) -> Iterator[str]:
    """What to tell of each fitting that may need more memory than the machine has: `there` bytes,
    None where that is not known. Whether it trains at all is only seen there, so it is no refusal.
    """
    if there is None or not is_own(student.folder):
        return
    layout = read_layout(student.folder)
    for target in targets:
        for spec in target.allocations:
            weights = cut(layout, _with(spec, pruned)).parameters
            needed = 0 if spec.fit is None else spec.fit.least_bytes(weights, trained=True)
            if needed > there:
                yield (
                    f"{target.name}: fitting {spec.name} takes {needed / 1e9:.1f} GB of memory at "
                    f"least if it has to train, and this machine has {there / 1e9:.1f}: it would "
                    "end there; without fit in a copy of the target it does not"
                )
