"""Every shipped recipe fits every shipped target; targets say where figures are from."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.library import DEFAULT_RECIPE, DEFAULT_TARGET, entries, shipped_root
from edgedistill.target import load_target
from edgedistill.validate import load_together, validate

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {entry.name: entry.path for entry in entries("recipe", ROOT)}
TARGETS = {entry.name: entry.path for entry in entries("target", ROOT)}


def test_the_defaults_are_shipped() -> None:
    assert shipped_root() == ROOT
    assert DEFAULT_RECIPE in RECIPES
    assert DEFAULT_TARGET in TARGETS
    assert set(TARGETS) >= {"laptop", "metal", "phone"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_and_target_fit(recipe: str, target: str) -> None:
    held, (device,) = load_together(RECIPES[recipe], [TARGETS[target]])
    assert (held.name, device.name) == (recipe, target)


def test_token_mixes_can_be_read() -> None:
    counts = validate(list(RECIPES.values()), list(TARGETS.values()))["recipes"]
    assert set(counts) == set(RECIPES)
    assert counts["support-sql"] >= 500


@pytest.mark.parametrize("name", TARGETS)
def test_every_figure_of_a_target_has_a_source(name: str) -> None:
    target = load_target(TARGETS[name])
    chosen = {"threads", "kernels", "allocations"} & target.model_fields_set
    figures = {"formats", "context_tokens", "memory_budget_mb", *chosen}
    figures |= {f"gates.{field}" for field in target.gates.model_fields_set}
    figures |= (
        {f"roofline.{f}" for f in target.roofline.model_fields_set} if target.roofline else set()
    )
    assert figures <= set(target.sources)
    fields = {*type(target).model_fields, *figures}
    assert set(target.sources) <= fields  # no source for a field that is not there
