"""What `recipes` and `targets` show: one row each, and every field of a target explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from edgedistill.allocations import AllocationSpec, FitSpec
from edgedistill.errors import ConfigError, Problem
from edgedistill.library import entries, find, named_or_all, shown
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.target import Roofline, Target, load_target
from edgedistill.validate import load_valid

if TYPE_CHECKING:
    from edgedistill.pipeline import Workspace

# Fields that hold a model, or a list of one, and may be left out.
UNSET: Mapping[str, type[BaseModel]] = {
    "allocations": AllocationSpec,
    "fit": FitSpec,
    "roofline": Roofline,
}


def recipe_rows(here: Path | None = None) -> list[dict[str, Any]]:
    """One row a recipe; one that does not validate says so in `problem`."""
    rows = []
    for entry in entries("recipe", here):
        row: dict[str, Any] = {
            "name": entry.name,
            "origin": entry.origin,
            "file": shown(entry.path),
        }
        try:
            recipe = load_recipe(entry.path, row["file"])
        except ConfigError as error:
            rows.append({**row, "problem": str(error)})
            continue
        rows.append(
            {
                **row,
                "description": recipe.description,
                "teacher": f"{recipe.teacher.model} ({recipe.teacher.kind})",
                "student": recipe.student.weights,
                "check": recipe.check.kind,
            }
        )
    return rows


def target_rows(here: Path | None = None) -> list[dict[str, Any]]:
    """One row a target; one that does not validate says so in `problem`."""
    rows = []
    for entry in entries("target", here):
        row: dict[str, Any] = {
            "name": entry.name,
            "origin": entry.origin,
            "file": shown(entry.path),
        }
        try:
            target = load_target(entry.path, row["file"])
        except ConfigError as error:
            rows.append({**row, "problem": str(error)})
            continue
        rows.append(
            {
                **row,
                "description": target.description,
                "runtime": target.runtime,
                "formats": list(target.formats),
                "allocations": [each.name for each in target.allocations],
                "latency": target.latency,
                "memory_budget_mb": target.memory_budget_mb,
            }
        )
    return rows


def reached(
    place: Workspace, recipes: Sequence[str], targets: Sequence[str]
) -> tuple[dict[Path, set[str]], list[Problem]]:
    """The stage folders that recipes and targets lead to, with the names of those recipes; and the
    problems of those that cannot be read.

    Raises:
        ConfigError: there is no recipe or target of such a name.
    """
    from edgedistill import planning, workspace

    held, devices, problems = everything(recipes, targets)
    return workspace.reached(partial(planning.everything, workspace=place), held, devices), problems


def everything(
    recipes: Sequence[str], targets: Sequence[str]
) -> tuple[list[Recipe], list[Target], list[Problem]]:
    """All recipes and targets known here, and these that are not: those that can be read, and the
    problems of all.

    Raises:
        ConfigError: there is no recipe or target of such a name.
    """
    paths = dict.fromkeys([*named_or_all("recipe", ()), *(find("recipe", n) for n in recipes)])
    devices = dict.fromkeys([*named_or_all("target", ()), *(find("target", n) for n in targets)])
    return load_valid(list(paths), list(devices))


def explain(target: Target) -> list[dict[str, Any]]:
    """Every field of a target: dotted name, value, what it means with its unit, and its source."""
    return list(_fields(target, "", target.sources))


def _fields(model: BaseModel, prefix: str, sources: dict[str, str]) -> Iterator[dict[str, Any]]:
    for name, field in type(model).model_fields.items():
        if name == "sources":
            continue
        value, dotted = getattr(model, name), prefix + name
        if isinstance(value, BaseModel):
            yield from _fields(value, f"{dotted}.", sources)
            continue
        if isinstance(model, FitSpec):
            value = model.resolved()[name]
        listed = isinstance(value, tuple) and value and isinstance(value[0], AllocationSpec)
        written = name in model.model_fields_set and value != ()
        given = "the target's file" if written else "default"
        yield {
            "field": dotted,
            "value": [each.name if listed else each for each in value]
            if isinstance(value, tuple)
            else value,
            "meaning": field.description or "",
            "source": sources.get(dotted, given),
        }
        if listed:
            for each in value:
                yield from _fields(each, f"{dotted}.{each.name}.", sources)
        elif name in UNSET:
            yield from _unset(UNSET[name], f"{dotted}{'[]' if name == 'allocations' else ''}.")


def _unset(model: type[BaseModel], prefix: str) -> Iterator[dict[str, Any]]:
    """The fields that could be given."""
    for name, field in model.model_fields.items():
        yield {
            "field": prefix + name,
            "value": None if field.is_required() else field.default,
            "meaning": field.description or "",
            "source": "required with it" if field.is_required() else "default",
        }
        if name in UNSET:
            yield from _unset(UNSET[name], f"{prefix}{name}.")
