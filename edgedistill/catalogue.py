"""What `recipes` and `targets` show: one row each, and every field of a target explained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edgedistill.errors import ConfigError
from edgedistill.library import entries, find, named_or_all, shown
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.target import AllocationSpec, Target, load_target
from edgedistill.validate import load_all


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
                "latency": target.latency,
                "memory_budget_mb": target.memory_budget_mb,
            }
        )
    return rows


def everything(recipes: Sequence[str], targets: Sequence[str]) -> tuple[list[Recipe], list[Target]]:
    """All recipes and targets known here, and these that are not.

    Raises:
        ConfigError: one of them does not validate; what it needs cannot be known.
    """
    paths = dict.fromkeys([*named_or_all("recipe", ()), *(find("recipe", n) for n in recipes)])
    devices = dict.fromkeys([*named_or_all("target", ()), *(find("target", n) for n in targets)])
    return load_all(list(paths), list(devices))


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
        if value and isinstance(value, tuple) and isinstance(value[0], AllocationSpec):
            for each in value:
                yield from _fields(each, f"{dotted}.{each.name}.", sources)
            continue
        given = "the target's file" if name in model.model_fields_set else "default"
        yield {
            "field": dotted,
            "value": list(value) if isinstance(value, tuple) else value,
            "meaning": field.description or "",
            "source": sources.get(dotted, given),
        }
