"""Every command of the README runs as it stands there, on a tiny model under the shipped names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeTeacher
from world import API_TEACHER, World, make_world

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
COMMANDS = "".join(text for language, text in BLOCKS if not language and "─" not in text)
LINES = [line for line in COMMANDS.splitlines() if line]
OURS = [line.partition("edgedistill ")[2] for line in LINES if "edgedistill " in line]
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("readme")
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        world = make_world(home, {**API_TEACHER, "base_url": teacher.base_url})
        put_recipe(world, "support-sql")
        (home / "targets").mkdir()
        for name in ("laptop", "phone", "metal"):
            text = world.target.read_text("utf-8").replace('"name": "tiny"', f'"name": "{name}"')
            (home / "targets" / f"{name}.yaml").write_text(text, "utf-8")
        yield world


def put_recipe(world: World, name: str) -> None:
    place = world.home / "recipes" / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world.home / "recipe", place)
    file = place / "recipe.yaml"
    text = file.read_text("utf-8").replace('"name": "tiny"', f'"name": "{name}"')
    file.write_text(text, "utf-8")


def test_each_command_of_ours_runs(world: World) -> None:
    assert len(OURS) >= 8
    for words in OURS:
        done = world.call(*words.split())
        assert done.returncode == 0, f"edgedistill {words}\n{done.stderr}"
        if words.startswith("init"):
            put_recipe(world, words.split()[1])  # what its author would now write into it


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_knows(line: str) -> None:
    done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_every_line_is_covered() -> None:
    known = ("make ", "edgedistill ", ".venv\\Scripts\\edgedistill ", "python scripts/setup_env.py",
             ".venv\\Scripts\\python scripts\\check.py")  # fmt: skip
    assert [line for line in LINES if not line.startswith(known)] == []
