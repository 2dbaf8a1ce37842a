"""The shipped recipes for large machines, scaled down: all of it, with tiny models in the places of
the pinned ones."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_student
from world import World

from edgedistill.scaled import STUDENT, SUFFIX, TEACHER

pytestmark = pytest.mark.integration
# Queries in which no letter comes twice in the same case.
TEACHERS, STUDENTS = "SELecT 1", "SELecT 2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("scaled"))
    world.stand_in(f"{TEACHER}-q4_k_m", tiny_student(world.home / "teacher", says=TEACHERS))
    world.stand_in(STUDENT, tiny_student(world.home / "student", seed=1, says=STUDENTS))
    return world


@pytest.mark.parametrize(
    ("recipe", "stage", "figure", "told"),
    [
        ("sql-8gpu", "refine", "pairs", "scaled down: distill.processes 1 instead of 8"),
        ("sql-24gb", "targets", "coverage", "scaled down: distill.tuning lora instead of qlora"),
    ],
)
def test_it_ends_with_a_bundle(
    world: World, recipe: str, stage: str, figure: str, told: str
) -> None:
    done = world.call("build", "--recipe", recipe, "--target", "laptop-large", "--scaled-down")
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    bundle = world.home / "dist" / f"{recipe}{SUFFIX}-laptop-large"
    stages = json.loads((bundle / "manifest.json").read_text("utf-8"))["provenance"]
    assert {"collect", "distill", stage, "merge", "bench"} <= stages.keys()
    made = json.loads((world.stages()[stage] / "manifest.json").read_text("utf-8"))
    assert made["facts"][figure] > 0
