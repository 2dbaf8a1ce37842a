"""What a sweep tries, in which order it ranks, and what it refuses. Sweeps run in integration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hf_folders import model_folder
from tiny import tiny_student

from edgedistill.distill.model import require_rank_of
from edgedistill.distill.trial import Sat, Trial
from edgedistill.errors import TrainingError, UsageError
from edgedistill.library import shipped_root
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.recipe import load_recipe
from edgedistill.sweep import (
    Grid,
    _Entry,
    lines_of,
    plain,
    ranked,
    shares_of,
    specs_of,
    step_at,
    sweep,
)

SPEC = DistillSpec(learning_rate=4e-4, epochs=3, lora=LoraSpec(rank=32, alpha=64))


def tried(spec: DistillSpec, **grid: Any) -> list[tuple[float, int, float]]:
    return [(s.learning_rate, s.lora.rank, s.epochs) for s in specs_of(spec, Grid(**grid))]


def test_by_default_learning_rates_around_the_recipes() -> None:
    assert tried(SPEC) == [(4e-4, 32, 3), (2e-4, 32, 3), (8e-4, 32, 3)]


def test_the_recipes_own_values_come_first_even_if_not_asked_for() -> None:
    found = tried(SPEC, learning_rates=(1e-4, 1e-4), ranks=(16, 8), epochs=(2,))
    assert found == [(4e-4, 32, 3), (1e-4, 16, 2), (1e-4, 8, 2)]


@pytest.mark.parametrize(("tuning", "alpha"), [("lora", 16), ("rslora", 32)])
def test_alpha_goes_with_the_rank(tuning: str, alpha: float) -> None:
    spec = SPEC.model_copy(update={"tuning": tuning})
    lora = specs_of(spec, Grid(ranks=(8,)))[1].lora
    assert (lora.rank, lora.alpha) == (8, alpha)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"learning_rates": (0.0,)}, "distill.learning_rate cannot be 0.0"),
        ({"learning_rates": (-1e-4,)}, "greater than 0"),
        ({"learning_rates": (math.nan,)}, "distill.learning_rate cannot be nan"),
        ({"learning_rates": (math.inf,)}, "finite"),
        ({"ranks": (0,)}, "distill.lora.rank cannot be 0"),
        ({"ranks": (100_000,)}, "less than or equal to 512"),
        ({"epochs": (0.0,)}, "distill.epochs cannot be 0"),
        ({"learning_rates": tuple(i * 1e-6 for i in range(1, 65))}, "65 trials"),
    ],
)
def test_values_that_no_recipe_could_have(grid: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        specs_of(SPEC, Grid(**grid))
    assert caught.value.exit_code == 2


def test_ranks_of_a_student_that_is_trained_whole() -> None:
    with pytest.raises(UsageError, match="every weight is trained"):
        specs_of(SPEC.model_copy(update={"tuning": "full"}), Grid(ranks=(8,)))


def test_rank_above_a_layers_width_is_told_before_training(tmp_path: Path) -> None:
    student = tiny_student(tmp_path)
    require_rank_of(student.folder, LoraSpec(rank=128))
    with pytest.raises(TrainingError, match=r"rank is 129, and .* is only 128 wide"):
        require_rank_of(student.folder, LoraSpec(rank=129))


def test_a_rank_that_is_known_to_be_too_wide_is_told_before_the_teacher_is_asked(
    tmp_path: Path,
) -> None:
    recipe = load_recipe(shipped_root() / "recipes" / "support-sql")
    base = recipe.student.model_copy(update={"weights": str(model_folder(tmp_path))})
    recipe = recipe.model_copy(update={"student": base})
    with pytest.raises(UsageError, match=r"--rank is 300, and a layer of .* is only \d+ wide"):
        sweep(recipe, Grid(ranks=(8, 300)), tmp_path / "ws", Silent())
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("trials", "rungs"),
    [(1, []), (2, [1 / 3]), (3, [1 / 3, 3**-0.5]), (9, [0.33, 0.44, 0.58, 0.76])],
)
def test_as_many_rungs_as_leave_one(trials: int, rungs: list[float]) -> None:
    assert shares_of(trials) == pytest.approx(rungs, abs=0.005)


def test_a_rung_lies_before_the_end_where_there_is_room() -> None:
    assert [step_at(0.76, steps) for steps in (1, 2, 3, 100)] == [1, 1, 2, 76]


def entry(right: int, nll: float, prompts: int = 10) -> _Entry:
    same = {str(i): i < right for i in range(prompts)}
    made = _Entry(cast(Trial, None), SPEC)
    made.last = Sat(same, nll, 0.0)
    return made


@pytest.mark.parametrize(
    ("figures", "order"),
    [
        ([(9, 0.5), (7, 0.1)], [0, 1]),  # two prompts are more than a tie
        ([(9, 0.5), (8, 0.1)], [1, 0]),  # one is one, and the NLL tells
        ([(8, 0.3), (8, 0.2), (8, 0.1)], [2, 1, 0]),
        ([(9, 0.5), (8, 0.4), (7, 0.1)], [1, 0, 2]),  # within one of the best, not of the next
    ],
)
def test_ranking(figures: list[tuple[int, float]], order: list[int]) -> None:
    entries = [entry(*each) for each in figures]
    assert [entries.index(each) for each in ranked(entries)] == order


@pytest.mark.parametrize("value", [4e-4, 0.1 + 0.2, 1e-7, 3.0, 64.0, 22.627416997969522])
def test_numbers_are_written_as_yaml_reads_them(value: float) -> None:
    assert yaml.safe_load(plain(value)) == value


def test_the_lines_make_the_recipe_the_winner() -> None:
    spec = SPEC.model_copy(update={"lora": LoraSpec(rank=32, alpha=64, dropout=0.05)})
    for made in specs_of(spec, Grid(learning_rates=(3e-5,), ranks=(8, 24), epochs=(0.5,))):
        said = yaml.safe_load(lines_of(made))["distill"]
        assert DistillSpec.model_validate(spec.model_dump() | said) == made
