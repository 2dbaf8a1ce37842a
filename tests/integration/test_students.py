"""Students that are no GGUF file, from end to end: a folder, layers pruned, a model of a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTeacher
from hf_folders import model_folder
from hub_server import REPO, REVISION, files_of, serving
from world import API_TEACHER, World, make_world

from edgedistill.artifacts import load_finished
from edgedistill.gguf_header import read_header

pytestmark = pytest.mark.integration
ONCE = {"distill": {"epochs": 1, "batch_size": 8, "evaluations": 1, "precision": "fp32"}}


@dataclass(frozen=True)
class Wanted(World):
    """A world whose recipe can be changed, with the environment of a hub."""

    url: str = ""

    def environment(self) -> dict[str, str]:
        return super().environment() | ({"HF_ENDPOINT": self.url} if self.url else {})

    def ask(self, weights: str, **student: Any) -> None:
        file = self.home / "recipe" / "recipe.yaml"
        recipe = json.loads(file.read_text("utf-8")) | ONCE
        recipe["student"] = {"weights": weights, "max_tokens": 12, **student}
        file.write_text(json.dumps(recipe), "utf-8")

    def facts(self, stage: str) -> Any:
        done = load_finished(self.stages()[stage], reused=True)
        assert done is not None
        return done.facts


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Wanted]:
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        made = make_world(tmp_path / "w", {**API_TEACHER, "base_url": teacher.base_url}, prompts=24)
        yield Wanted(made.home)


def test_a_folder_pruned_becomes_a_bundle_and_an_adapter_alone(world: Wanted) -> None:
    folder = model_folder(world.home / "recipe" / "my-model", "qwen2", num_hidden_layers=3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    world.ask("./my-model", prune={"drop_layers": 1})
    world.run()
    kept = world.facts("prune")["layers"]
    (model,) = world.bundle.glob("my-model-2of3-layers-1.3M-tiny-v1.0-*.gguf")
    assert read_header(model).keys["qwen2.block_count"] == len(kept) == 2
    card = (world.bundle / "MODEL_CARD.md").read_text("utf-8")
    assert "my-model pruned to 2 of 3 layers | mit |" in card
    assert f"Left, counted from 0: {', '.join(map(str, kept))}." in card
    assert str(world.home) not in (world.bundle / "manifest.json").read_text("utf-8")

    done = world.call("lora", "--recipe", "recipe", "-o", "lora.gguf")
    assert done.returncode == 0, done.stderr
    assert "my-model pruned to 2 of 3 layers; as a GGUF file:" in done.stderr
    assert read_header(world.home / "lora.gguf").keys["general.type"] == "adapter"

    refused = world.call("adapt", str(world.bundle), "--recipe", "recipe", "-o", "new")
    assert refused.returncode == 2, refused.stderr


def test_a_hub_model_is_fetched_once(world: Wanted) -> None:
    source = model_folder(world.home / "source", "llama")
    world.ask(f"{REPO}@{REVISION}")
    with serving(files_of(source)) as hub:
        online = Wanted(world.home, hub.url)
        online.run("validate")  # sees no more than the form of the name
        online.run("export")
    assert world.facts("student")["weights"] == REPO
    assert world.facts("tokens")["prompts"] == 24
    closed = Wanted(world.home, "http://127.0.0.1:9")
    done = closed.run("export")
    assert "student" in done.stderr
    (model,) = world.stages()["export"].glob("Tiny-2M-Instruct-tiny-v1.0-F16.gguf")
    keys = read_header(model).keys
    assert keys["general.base_model.0.repo_url"] == f"https://huggingface.co/{REPO}"
