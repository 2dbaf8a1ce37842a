"""`sweep` and `learning-curve` on a tiny real student, and what a build makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ran
from fakes import KEY, FakeTeacher
from world import API_TEACHER, make_world

from edgedistill import pipeline
from edgedistill.artifacts import Finished, load_finished
from edgedistill.errors import TrainingError, UsageError
from edgedistill.fidelity import read_rows
from edgedistill.learning_curve import learning_curve
from edgedistill.methods import DistillSpec
from edgedistill.planning import plan
from edgedistill.progress import Silent
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.sweep import Grid, sweep
from edgedistill.target import load_target

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parent.parent.parent
GRID = Grid(learning_rates=(1e-8, 4e-3, 1e30))
DISTILL: dict[str, Any] = {
    "epochs": 1, "batch_size": 4, "evaluations": 2, "precision": "fp32", "learning_rate": 2e-3,
    "lora": {"rank": 8, "alpha": 16, "dropout": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe whose answers are in its workspace; nobody is asked again."""
    home = tmp_path_factory.mktemp("tuning")
    os.environ["TINY_KEY"] = KEY
    with FakeTeacher(answer=lambda prompt: "odd" if prompt[-1] in "13579" else "even") as teacher:
        world = make_world(home, {**API_TEACHER, "base_url": teacher.base_url})
        file = home / "recipe" / "recipe.yaml"
        value = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(value | {"distill": DISTILL}), "utf-8")
        place = pipeline.Workspace(world.workspace, home / "dist")
        pipeline.build(load_recipe(file), [load_target(world.target)], place, Silent(), "curate")
    yield home
    del os.environ["TINY_KEY"]


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    return load_recipe(home / "recipe")


@pytest.fixture(scope="module")
def swept(home: Path, recipe: Recipe) -> Finished:
    return sweep(recipe, GRID, home / ".edgedistill", Silent())


def distilled(recipe: Recipe, root: Path, home: Path) -> Finished:
    """The stage "distill" of a build, and of nothing behind it."""
    target = load_target(home / "target.yaml")
    place = pipeline.Workspace(root, home / "dist")
    (made,) = pipeline.build(recipe, [target], place, Silent(), "distill")
    done = load_finished(root / f"distill-{made.stages['distill']['key']}", reused=True)
    assert done is not None
    return done


def without_clock(facts: Any) -> Any:
    return {**facts, "trials": [{**trial, "seconds": 0} for trial in facts["trials"]]}


def test_early_losers_are_left(home: Path, swept: Finished) -> None:
    own, slow, fast, wild = swept.facts["trials"]
    assert swept.facts["rungs"] == pytest.approx([1 / 3, 3**-0.5])
    assert slow["stopped_at"] == slow["exams"][-1]["step"] == -(-slow["steps"] // 3)
    assert "number 3 of 4" in slow["why"]
    assert wild["why"].startswith("diverged: the loss is")
    assert wild["exams"] == []
    assert {own["stopped_at"], own["exams"][-1]["step"]} == {None, own["steps"]}
    left = home / ".edgedistill" / slow["folder"]
    assert (left / "resume" / f"checkpoint-{slow['stopped_at']}" / "complete").is_file()
    assert not (left / "manifest.json").exists()
    assert swept.facts["winner"] in (0, 2)
    assert fast["seconds"] > 0


def test_pages_and_json_say_the_same(swept: Finished) -> None:
    assert json.loads((swept.folder / "sweep.json").read_text("utf-8")) == swept.facts
    page = (swept.folder / "sweep.html").read_text("utf-8")
    assert swept.facts["said"].split(":")[0] in page
    assert page.count("<svg") == 2


def test_the_winner_is_the_adapter_of_a_recipe_with_its_lines(
    home: Path, swept: Finished, recipe: Recipe, tmp_path: Path
) -> None:
    values = recipe.distill.model_dump() | yaml.safe_load(swept.facts["lines"])["distill"]
    spec = DistillSpec.model_validate(values)
    better = recipe.model_copy(update={"distill": spec})
    made = distilled(better, home / ".edgedistill", home)
    assert made.name == swept.facts["trials"][swept.facts["winner"]]["folder"]
    once = distilled(better, copied(home, tmp_path), home)  # trained without a stop
    assert once.digest == made.digest


def test_a_loser_goes_on_where_it_was_left(
    home: Path, swept: Finished, recipe: Recipe, tmp_path: Path
) -> None:
    loser = swept.facts["trials"][1]
    values = {"learning_rate": loser["learning_rate"]}
    wanted = recipe.model_copy(update={"distill": recipe.distill.model_copy(update=values)})
    made = distilled(wanted, home / ".edgedistill", home)
    assert made.name == loser["folder"]
    assert made.facts["resumed_from_step"] == loser["stopped_at"]
    assert distilled(wanted, copied(home, tmp_path), home).digest == made.digest


def copied(home: Path, into: Path) -> Path:
    """Another workspace with the same answers."""
    root = into / "workspace"
    root.mkdir()
    (root / "traces.db").write_bytes((home / ".edgedistill" / "traces.db").read_bytes())
    return root


def test_a_finished_sweep_is_reused_and_stays_with_its_recipe(
    home: Path, swept: Finished, recipe: Recipe
) -> None:
    root = home / ".edgedistill"
    before = sorted(path.name for path in root.iterdir())
    again = sweep(recipe, GRID, root, Silent())
    assert (again.name, again.reused) == (swept.name, True)
    assert sorted(path.name for path in root.iterdir()) == before
    other = recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"learning_rate": 4e-3})}
    )
    target = load_target(home / "target.yaml")
    for each in (recipe, other):  # whatever it has for the values that were tried
        steps = plan(each, [target], pipeline.Workspace(root, home / "dist"))
        assert ("sweep", "reused", swept.folder) in steps
    changed = recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"batch_size": 2})}
    )
    steps = plan(changed, [target], pipeline.Workspace(root, home / "dist"))
    assert "sweep" not in [stage for stage, *_ in steps]


def test_killed_it_goes_on_and_finds_the_same(
    home: Path, swept: Finished, recipe: Recipe, tmp_path: Path
) -> None:
    root = copied(home, tmp_path)
    words = [sys.executable, __file__, str(home / "recipe"), str(root)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "integration")))
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths})
    try:
        limit = time.monotonic() + 120
        while len(list(root.glob("exam-*/manifest.json"))) < 3:
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    kept = {path: path.stat().st_mtime_ns for path in root.glob("exam-*/exam.json")}
    again = sweep(recipe, GRID, root, Silent())
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert without_clock(again.facts) == without_clock(swept.facts)


def test_nothing_is_left_when_all_diverge(home: Path, recipe: Recipe, tmp_path: Path) -> None:
    wild = recipe.distill.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match="every trial came to nothing"):
        sweep(
            recipe.model_copy(update={"distill": wild}),
            Grid(learning_rates=(1e31,)),
            copied(home, tmp_path),
            Silent(),
        )


def test_rank_above_a_layer_is_told_before_anything_is_trained(
    home: Path, recipe: Recipe, tmp_path: Path
) -> None:
    root = copied(home, tmp_path)
    with pytest.raises(UsageError, match="only 128 wide"):
        sweep(recipe, Grid(ranks=(8, 200)), root, Silent())
    assert not list(root.glob("distill-*"))


def test_parts_of_the_rows_lie_inside_each_other(home: Path, recipe: Recipe) -> None:
    root = home / ".edgedistill"
    done = learning_curve(recipe, (0.25, 0.5, 1.0), 2, root, Silent())
    rows = [point["rows"] for point in done.facts["points"]]
    assert rows == sorted(set(rows))
    parts: dict[int, list[set[str]]] = {}
    for file in root.glob("subset-*/train.jsonl"):
        spec = json.loads((file.parent / "manifest.json").read_text("utf-8"))["spec"]
        parts.setdefault(spec["seed"], []).append({row.id for row in read_rows(file)})
    assert set(parts) == {0, 1}
    for drawn in parts.values():
        small, large = sorted(drawn, key=len)
        assert [len(small), len(large)] == rows[:2]
        assert small < large
    assert len({frozenset(min(drawn, key=len)) for drawn in parts.values()}) == 2
    made = distilled(recipe, root, home)
    assert done.facts["points"][-1]["folders"][0] == made.name  # all rows: what a build trains
    assert done.facts["forecast"]["refused"]
    assert done.facts["said"].startswith("No forecast: ")
    assert done.facts["more_calls"] == -(-rows[-1] * 48 // 48)


def test_curve_is_reused_and_told_to_a_build(home: Path, recipe: Recipe) -> None:
    root = home / ".edgedistill"
    first = learning_curve(recipe, (0.5, 1.0), 1, root, Silent())
    before = sorted(path.name for path in root.iterdir())
    assert learning_curve(recipe, (0.5, 1.0), 1, root, Silent()).reused
    assert sorted(path.name for path in root.iterdir()) == before
    steps = plan(recipe, [load_target(home / "target.yaml")], pipeline.Workspace(root, home))
    assert ("learning-curve", "reused", first.folder) in steps


def test_commands_show_tables(home: Path, swept: Finished, run: Callable[..., Ran]) -> None:
    told = ("--recipe", str(home / "recipe"), "--workspace", str(home / ".edgedistill"))
    rates = ",".join(map(str, GRID.learning_rates))
    shown = run("sweep", *told, "--learning-rate", rates)
    assert shown.code == 0
    for expected in ("the recipe's own", "diverged", "learning_rate: ", "sweep.html"):
        assert expected in shown.out
    value = run("sweep", *told, "--learning-rate", rates, "--json").json
    assert value["trials"] == swept.facts["trials"]
    assert Path(value["page"]).is_file()
    curve = run("learning-curve", *told, "--sizes", "0.5,1")
    assert curve.code == 0
    assert "No forecast: a forecast needs trainings of 3 sizes" in " ".join(curve.out.split())


if __name__ == "__main__":  # the sweep that is killed
    sweep(load_recipe(Path(sys.argv[1])), GRID, Path(sys.argv[2]), Silent())
