"""From a bundle in the field to an adapter on top of it, and the update that brings it there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeTeacher
from world import API_TEACHER, World, make_world

from edgedistill.artifacts import digest_of_file
from edgedistill.gguf_header import read_header
from edgedistill.runtime import LlamaCpp

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A finished build, and `recipe2`: the same prompts, its student the bundle's own model."""
    home = tmp_path_factory.mktemp("adapt")
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        made = make_world(home, {**API_TEACHER, "base_url": teacher.base_url})
        made.run()
        model = next(made.bundle.glob("*.gguf"))
        shutil.copytree(home / "recipe", home / "recipe2")
        file = home / "recipe2" / "recipe.yaml"
        recipe = json.loads(file.read_text("utf-8"))
        recipe["student"]["weights"] = str(model)
        recipe["distill"] |= {"lora": {"rank": 4, "alpha": 8}, "epochs": 1}
        file.write_text(json.dumps(recipe), "utf-8")
        shutil.copytree(home / "recipe2", home / "recipe3")
        recipe["student"]["system"] = "Otherwise"
        (home / "recipe3" / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
        shutil.copytree(home / "recipe2", home / "recipe4")
        recipe["student"] |= {"system": None, "prune": {"drop_layers": 1}}
        (home / "recipe4" / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
        yield made


def files(folder: Path) -> dict[str, str]:
    return {path.name: digest_of_file(path) for path in folder.iterdir()}


def test_adapt_and_update(world: World, tmp_path: Path) -> None:
    new, update = world.home / "dist" / "v2", tmp_path / "v2.edup"
    done = world.call("adapt", str(world.bundle), "--recipe", "recipe2", "-o", str(new))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((new / "manifest.json").read_text("utf-8"))
    lora = new / manifest["facts"]["adapter"]
    model = new / manifest["facts"]["model"]
    keys = read_header(lora).keys
    assert keys["edgedistill.base_sha256"] == digest_of_file(model)
    assert keys["edgedistill.lora_rank"] == 4
    assert digest_of_file(model) == digest_of_file(world.bundle / model.name)
    assert f"--lora {lora.name}" in (new / "README.md").read_text("utf-8")
    assert f"ADAPTER ./{lora.name}\n" in (new / "Modelfile").read_text("utf-8")
    assert f"| `{lora.name}` | its adapter |" in (new / "README.md").read_text("utf-8")
    told = " ".join((new / "MODEL_CARD.md").read_text("utf-8").split())
    assert "rank 4, alpha 8" in told
    assert "1 epoch" in told
    assert "the report of the model without its adapter" in (new / "report.html").read_text("utf-8")
    figures = json.loads((new / "adapter.json").read_text("utf-8"))
    assert figures["agreement"]["n"] == figures["rows"]
    assert figures["kld"]["mean_kld"] < 0.02  # an activation is rounded to 8 bits in llama.cpp
    held = Path(shutil.copytree(world.bundle, tmp_path / "held"))
    assert world.call("update", "make", str(held), str(new), "-o", str(update)).returncode == 0
    done = world.call("update", "apply", str(held), str(update), "--check")
    assert done.returncode == 0, done.stderr
    assert files(held) == files(new)
    assert update.stat().st_size < lora.stat().st_size + 200_000


@pytest.mark.parametrize(
    ("recipe", "output", "message"),
    [
        ("recipe", "dist/other", "the recipe's student is not the model of this bundle"),
        ("recipe2", "dist", "something is here already"),
        ("recipe4", "dist/other", "student.prune would take layers away"),
        ("recipe3", "dist/other", "student.system is 'Otherwise', and None in the bundle"),
    ],
)
def test_bad_input(world: World, recipe: str, output: str, message: str) -> None:
    done = world.call("adapt", str(world.bundle), "--recipe", recipe, "-o", output)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_bundle_that_is_not_whole_is_refused_before_training(
    world: World, tmp_path: Path
) -> None:
    torn = Path(shutil.copytree(world.bundle, tmp_path / "torn"))
    (torn / "report.html").unlink()
    done = world.call("adapt", str(torn), "--recipe", "recipe2", "-o", str(tmp_path / "v2"))
    assert done.returncode == 1
    assert "report.html is not there any more" in done.stderr
    assert "running" not in done.stderr


def test_the_adapter_alone(world: World, tmp_path: Path) -> None:
    lora = tmp_path / "lora.gguf"
    done = world.call("lora", "--recipe", "recipe", "--type", "Q8_0", "-o", str(lora))
    assert done.returncode == 0, done.stderr
    with LlamaCpp(world.home / "recipe" / "student.gguf", threads=1, adapter=lora) as runtime:
        assert runtime.tokenize("x")
