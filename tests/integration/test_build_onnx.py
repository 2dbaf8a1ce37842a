"""The whole job for a target that runs onnxruntime-genai, beside one that runs llama.cpp."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeTeacher
from world import API_TEACHER, World, make_world

from edgedistill.artifacts import MANIFEST

pytestmark = pytest.mark.integration
FORMATS = ["int4-b32-int8head", "int8-b32"]
ONNX = {"name": "onnx", "runtime": "onnxruntime-genai", "formats": FORMATS}
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("built")
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        world = make_world(home, {**API_TEACHER, "base_url": teacher.base_url})
        target = json.loads(world.target.read_text("utf-8"))
        (home / "onnx.yaml").write_text(json.dumps(target | ONNX), "utf-8")
        done = world.call(
            "build", "--recipe", "recipe", "--target", "target.yaml", "--target", "onnx.yaml"
        )
        assert done.returncode == 0, done.stderr
        yield world


@pytest.fixture
def bundle(built: World) -> Path:
    return built.home / "dist" / "tiny-onnx"


def test_both_targets_share_what_they_can(built: World) -> None:
    folders = [file.parent.name for file in built.workspace.glob("*-*/manifest.json")]
    counts = {name: sum(f.startswith(f"{name}-") for f in folders) for name in built.stages()}
    twice = {"export", "verify", "baseline", "quantize", "unquantized", "bench"}
    formats = json.loads(built.target.read_text("utf-8"))["formats"]
    assert counts.pop("candidate") == len(FORMATS) + len(formats)
    assert {name for name, count in counts.items() if count == 2} == twice
    assert {name for name, count in counts.items() if count == 1} == counts.keys() - twice


def test_the_bundle_is_whole(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    model = bundle / report["model_file"]
    assert "Modelfile" not in {path.name for path in bundle.iterdir()}
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(manifest["outputs"]) == files - {MANIFEST}
    assert report["model_bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert manifest["provenance"]["export"]["spec"]["runtime"] == "onnxruntime-genai"


def test_the_report_holds_what_was_measured(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    assert report["links"][1]["mean_kld"] < 1e-6 < report["links"][2]["mean_kld"]
    assert {entry["format"] for entry in report["candidates"]} == set(FORMATS)
    assert [latency["who"] for latency in report["latencies"]] == ["teacher", "student in process"]
    assert report["speedup_p50"] is None
    assert any("no server" in note for note in report["notes"])


def test_the_readme_gives_the_reported_answer(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    shown = report["examples"]
    example = next((e for e in shown if e["same"]), shown[0])
    (code,) = PYTHON.findall((bundle / "README.md").read_text("utf-8"))
    assert example["prompt"] in code
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=bundle, capture_output=True, check=True, encoding="utf-8",
    )  # fmt: skip
    assert done.stdout.strip() == example["student"]


def test_an_allocation_is_fitted_for_the_kernels_of_onnx(built: World, bundle: Path) -> None:
    target = json.loads((built.home / "onnx.yaml").read_text("utf-8"))
    fit = {"method": "full", "epochs": 2, "batch_size": 8, "evaluations": 2}
    fit |= {"min_kld": 0.0}
    mixed = {"name": "mixed", "types": ["int4-b32", "int8-b32"], "budget_mb": 1.1}
    mixed |= {"vocabulary": 2, "fit": fit}
    gates = {"max_agreement_drop": 1.0, "max_nll_rise": 50.0}
    changed = {**target, "formats": ["int8-b32"], "allocations": [mixed], "gates": gates}
    (built.home / "onnx.yaml").write_text(json.dumps(changed), "utf-8")
    done = built.call("build", "--recipe", "recipe", "--target", "onnx.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    assert report["format"] == "mixed"
    assert [link["step"] for link in report["links"][2:]] == ["trim", "fit", "quantize"]
    assert report["links"][-1]["mean_kld"] < 0.05  # kernels alone, which round activations
    assert report["model_bytes"] <= 1.1e6
    made_by = json.loads((bundle / MANIFEST).read_text("utf-8"))["provenance"]
    assert {"sensitivity of mixed", "fit of mixed", "prove"} <= set(made_by)
    assert "importance of mixed" not in made_by
