"""What `sweep` and `learning-curve` share, and where a build finds what they found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.artifacts import MANIFEST, Dataset, Finished, Student, digest_of, load_finished
from edgedistill.checks import check_identity
from edgedistill.progress import Progress
from edgedistill.recipe import Recipe
from edgedistill.tuning_results import TUNED

MEASURED = {"precision"}  # by the machine, where the recipe leaves it open
SWEPT = MEASURED | {"learning_rate", "epochs"}
SWEPT_OF_LORA = {"rank", "alpha"}


def scope_of(stage: str, recipe: Recipe, dataset: Dataset, student: Student) -> str:
    """A digest that is the same for all recipes that a stage of TUNED tells something about: for
    "sweep", whatever they have for the values that it varies."""
    shaping = recipe.distill.shaping()
    left_out = SWEPT if stage == "sweep" else MEASURED
    kept: dict[str, Any] = {name: value for name, value in shaping.items() if name not in left_out}
    if stage == "sweep":
        kept["lora"] = {n: v for n, v in kept["lora"].items() if n not in SWEPT_OF_LORA}
    return digest_of(
        {
            "distill": kept,
            "prompt": recipe.student.model_dump(mode="json", exclude={"weights"}),
            "check": check_identity(recipe.check),
            "dataset": dataset.digest,
            "student": student.digest,
        }
    )


def note_tuning(
    recipe: Recipe, dataset: Dataset, student: Student, out: Path, progress: Progress
) -> None:
    """Tell the newest finished sweep and learning curve of a recipe as stages of its build: their
    manifests hold what they found, for the report."""
    for stage in TUNED:
        found = _newest(out, stage, scope_of(stage, recipe, dataset, student))
        if found is not None:
            progress.stage(stage, found.folder, reused=True)


def _newest(out: Path, stage: str, scope: str) -> Finished | None:
    folders = [file.parent for file in out.glob(f"{stage}-*/{MANIFEST}")]
    done = (load_finished(folder, reused=True) for folder in folders)
    fitting = [each for each in done if each and each.manifest["spec"].get("scope") == scope]
    return max(fitting, key=lambda each: str(each.manifest["started"]), default=None)
