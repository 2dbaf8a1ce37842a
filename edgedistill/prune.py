"""Prune: the base student without the layers that its token mix misses least.

The distillation that follows heals the cut, as in "The Unreasonable Ineffectiveness of the Deeper
Layers" (Gromov et al. 2024, arXiv 2403.17887); which layers go is measured, not taken from depth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Dataset, Identity, Student, run_stage, tool_versions
from edgedistill.errors import ArtifactError, TargetError
from edgedistill.fidelity import read_rows
from edgedistill.layers import kept_layers, require_layers, write_cut
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec


def prune(
    student: Student, dataset: Dataset, spec: StudentSpec, out: Path, progress: Progress
) -> Student:
    """Stage "prune": `spec.prune.drop_layers` layers less, each time the one whose absence changes
    predictions on training rows least; the student as it is where the recipe asks for none.

    Raises:
        TargetError: see `require_prunable`.
    """
    if spec.prune is None:
        return student
    require_prunable(student, spec)
    drop = spec.prune.drop_layers
    identity = Identity(
        stage="prune",
        version=1,
        spec={
            "drop_layers": drop,
            "prompt": spec.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={"student": student.digest, "dataset": dataset.digest},
        tools=tool_versions("torch", "transformers"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        shown = StudentPrompt(student.folder, spec)
        rows = read_rows(dataset.folder / "train.jsonl")
        layers = kept_layers(student.folder, shown, rows, drop, progress)
        write_cut(student.folder, folder, None, layers)
        return {"layers": layers, "of": len(layers) + drop}

    done = run_stage(identity, out, progress, work)
    made = replace(
        student,
        folder=done.folder,
        digest=done.digest,
        layers=tuple(done.facts["layers"]),
        layers_before=done.facts["of"],
    )
    progress.note(f"student: {made.title}")
    return made


def require_prunable(student: Student, spec: StudentSpec) -> None:
    """Refuse before the teacher is asked what `prune` would refuse.

    Raises:
        TargetError: there are not so many layers, or they are of several kinds in a fixed order.
    """
    if spec.prune is None:
        return
    config = json.loads((student.folder / "config.json").read_text("utf-8"))
    try:
        hint = "leave student.prune out of the recipe"
        require_layers(config, spec.prune.drop_layers, student.folder, hint)
    except ArtifactError as error:
        raise TargetError(f"student.prune: {error.what}", where=error.where, hint=error.hint) from (
            error
        )
