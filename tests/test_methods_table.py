"""What the comparison of methods refuses before it measures for hours, and its table."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from edgedistill.recipe import ApiTeacher, Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "methods_table.py"))


@pytest.fixture
def recipe() -> Recipe:
    """With an API's teacher that gives no log-probabilities."""
    teacher = ApiTeacher(kind="api", base_url="http://x/v1", model="m", licence="none")
    held = load_recipe(ROOT / "recipes" / "support-sql")
    return held.model_copy(update={"teacher": teacher})


@pytest.mark.parametrize(
    ("methods", "further", "said"),
    [
        (["sft", "onpolicy"], None, "'onpolicy' is none of base, sft"),
        (["sft", "further"], None, "further needs --further"),
        (["logits"], None, "top_logprobs"),
        (["white-box"], None, "a local teacher"),
        (["sft", "further", "on-policy"], Path("more.jsonl"), ""),
    ],
)
def test_what_a_method_lacks_is_told_first(
    recipe: Recipe, methods: list[str], further: Path | None, said: str
) -> None:
    why = BENCHMARK["refused"](recipe, methods, further)
    assert said in why
    assert bool(why) == bool(said)


def run(**figures: Any) -> dict[str, Any]:
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    made = {"method": "sft", "agreement": share, "gold": None, "teacher_gold": None}
    return {**made, "teacher_calls": 1, "training_seconds": 60.0, **figures}


@pytest.mark.parametrize(
    ("runs", "cells"),
    [
        ([run()], "| - | - | - | 1 | 1.0 |"),  # kept before there was a column of unseen wordings
        ([run(), run(agreement_unseen={"value": 0.25})], "| -, 0.250 | - | - | 1 |"),
        ([run(gold={"value": 0.0}, teacher_gold={"value": 0.0})], "| - | 0.000 | - | 1 |"),
        ([run(gold={"value": 0.4}, teacher_gold={"value": 0.8})], "| - | 0.400 | 50.0% | 1 |"),
    ],
)
def test_its_table_has_a_cell_for_what_is_not_known(runs: list[dict[str, Any]], cells: str) -> None:
    assert cells in BENCHMARK["_table"](runs)
