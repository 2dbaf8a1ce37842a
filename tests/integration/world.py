"""A whole small world for end-to-end tests: a tiny real student, a recipe, a target, a teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import KEY, MODEL
from tiny import tiny_student

from edgedistill.artifacts import Student, load_finished
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.weights import CACHE_VARIABLE, FOLDERS_VARIABLE, KNOWN
from edgedistill.weights.cache import remember

# Those that take long enough to be killed in; quantize only picks.
STAGES = (
    "collect curate student distill merge export verify baseline candidate unquantized bench pack"
).split()
API_TEACHER = {"kind": "api", "model": MODEL, "licence": "none", "api_key_env": "TINY_KEY"}
LOCAL_TEACHER = {"kind": "local", "model": "tiny", "licence": "none", "weights": "student.gguf"}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "description": "Repeats a word.",
    "prompts": "prompts.jsonl",
    "check": {"kind": "exact"},
    "student": {"weights": "student.gguf", "max_tokens": 12},
    "distill": {"epochs": 6, "batch_size": 4, "evaluations": 2, "precision": "fp32"},
    "bench": {"latency_prompts": 4, "llama_bench_runs": 1, "bootstrap": 100},
    # A random model is no student: what is tested here is the way, not the result.
    "gates": {"merge_mean_kld": 1e-4, "export_mean_kld": 1e-3, "adapter_mean_kld": 0.02},
}
TARGET: dict[str, Any] = {
    "name": "tiny",
    "description": "whatever runs the tests",
    "device_class": "laptop",
    "runtime": "llama.cpp",
    "formats": ["Q4_0", "Q8_0"],
    "latency": "measured",
    "threads": 1,
    "context_tokens": 256,
    "memory_budget_mb": 500,
    "gates": {"max_agreement_drop": 1.0},
}


@dataclass(frozen=True)
class World:
    """A folder with `recipe/`, `target.yaml`, and what a build leaves in `.edgedistill`, `dist`."""

    home: Path

    @property
    def workspace(self) -> Path:
        return self.home / ".edgedistill"

    @property
    def prompts(self) -> Path:
        return self.home / "recipe" / "prompts.jsonl"

    @property
    def bundle(self) -> Path:
        return self.home / "dist" / "tiny-tiny"

    @property
    def target(self) -> Path:
        return self.home / "target.yaml"

    def command(self, verb: str = "build") -> list[str]:
        words = [sys.executable, "-m", "edgedistill", verb, "--recipe", "recipe"]
        once = verb in ("collect", "curate", "distill", "merge", "export")
        return words if once else [*words, "--target", "target.yaml"]

    def environment(self) -> dict[str, str]:
        own = {CACHE_VARIABLE: self.home / "cache", FOLDERS_VARIABLE: self.home / "weights"}
        paths = {name: str(path) for name, path in own.items()}
        return {**os.environ, "TINY_KEY": KEY, "NO_COLOR": "1", **paths}

    def stand_in(self, pinned: str, student: Student) -> None:
        """A tiny model in the place of pinned weights: as if its bytes had been found the right
        ones."""
        weights, folder = KNOWN[pinned], self.home / "weights"
        folder.mkdir(exist_ok=True)
        write_tiny_gguf(student, folder / weights.file)
        remember(folder / weights.file, weights.sha256, self.home / "cache" / "weights")

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgedistill", *words], cwd=self.home, env=self.environment(),
            text=True, encoding="utf-8", capture_output=True, check=False, timeout=280,
        )  # fmt: skip

    def run(self, verb: str = "build", *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.call(*self.command(verb)[3:])
        assert not check or done.returncode == 0, done.stderr
        return done

    def stages(self) -> dict[str, Path]:
        """The newest complete folder of each stage."""
        folders = sorted(self.workspace.glob("*-*/manifest.json"), key=lambda p: p.stat().st_mtime)
        return {file.parent.name.rsplit("-", 1)[0]: file.parent for file in folders}

    def digests(self) -> dict[str, Any]:
        """What two builds of the same world must share: everything that is not a timing."""
        found: dict[str, Any] = {}
        for name, folder in self.stages().items():
            done = load_finished(folder, reused=True)
            assert done is not None
            outputs = done.manifest["outputs"]
            parts = {"bench": outputs.get("fidelity.json"), "collect": done.facts.get("digest")}
            found[name] = parts.get(name, (folder.name, outputs))
        for model in (self.home / "dist").glob("*/*.gguf"):
            found["model"] = (model.name, model.read_bytes())
        return found


def write_tiny_gguf(student: Student, into: Path) -> None:
    made_from = Provenance("tiny", student.name, student.licence, student.digest)
    write_gguf(student.folder, student.folder / TOKENIZER_GGUF, into, made_from, Silent())


def make_world(home: Path, teacher: Mapping[str, Any], prompts: int = 48) -> World:
    """Write a recipe with `teacher`, its prompts (two for each phrasing) and a target."""
    recipe = home / "recipe"
    recipe.mkdir(parents=True)
    write_tiny_gguf(tiny_student(home / "student"), recipe / "student.gguf")
    (recipe / "recipe.yaml").write_text(json.dumps({**RECIPE, "teacher": teacher}), "utf-8")
    (home / "target.yaml").write_text(json.dumps(TARGET), "utf-8")
    world = World(home)
    lines = [
        {"id": f"p{i}", "prompt": f"say the word {i}", "tags": [f"phrasing:{i // 2}"]}
        for i in range(prompts)
    ]
    world.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return world
