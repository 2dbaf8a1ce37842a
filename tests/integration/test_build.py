"""The whole job on a tiny real model: built, reused, changed, and broken on purpose."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeTeacher
from tiny import rewrite_gguf
from world import API_TEACHER, World, make_world

from edgedistill.artifacts import (
    MANIFEST,
    dataset_digest,
    digest_of,
    digest_of_file,
    load_finished,
    write_json,
)
from edgedistill.bundle_result import read_bundle
from edgedistill.quantize.candidate import FIGURES

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def teacher() -> Iterator[FakeTeacher]:
    with FakeTeacher(answer=lambda prompt: prompt.rsplit(" ", 1)[-1]) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, teacher: FakeTeacher) -> World:
    home = tmp_path_factory.mktemp("built")
    world = make_world(home, {**API_TEACHER, "base_url": teacher.base_url})
    world.run()
    return world


@pytest.fixture
def world(built: World, tmp_path: Path) -> World:
    """A copy that a test may spoil."""
    shutil.copytree(built.home, tmp_path / "world")
    return World(tmp_path / "world")


def test_the_bundle_is_whole(built: World) -> None:
    bundle = built.home / "dist" / "tiny-tiny"
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    names = {path.name for path in bundle.iterdir()} - {MANIFEST}
    wanted = {"MODEL_CARD.md", "Modelfile", "README.md", "report.html", "report.json"}
    assert wanted <= names
    assert set(manifest["outputs"]) == names
    for name, entry in manifest["outputs"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == entry["sha256"]


def test_the_report_holds_what_was_measured(built: World) -> None:
    report = json.loads((built.home / "dist" / "tiny-tiny" / "report.json").read_text("utf-8"))
    names = ["base", "adapter", "merged", "exported", "quantized"]
    assert [item["model"] for item in report["agreements"]] == names
    assert [link["step"] for link in report["links"]] == ["merge", "export", "quantize"]
    assert report["links"][1]["mean_kld"] < 1e-3 < report["links"][2]["mean_kld"]
    assert {latency["who"] for latency in report["latencies"]} >= {"teacher", "student"}
    assert [c["format"] for c in report["candidates"] if c["chosen"]] == [report["format"]]


def test_the_bundle_stands_beside_results(built: World) -> None:
    found = read_bundle(built.bundle)
    curated = next(built.workspace.glob("curate-*"))
    done = load_finished(curated, reused=True)
    assert done is not None
    assert found.token_mix is not None
    assert found.token_mix["dataset"] == dataset_digest(done)
    assert {"tg128", "end_to_end_p50", "cold_start"} <= found.figures.keys()
    assert [link["step"] for link in found.model["bundle"]["chain"]][:2] == ["merge", "export"]


def test_a_second_build_reuses_everything(world: World, teacher: FakeTeacher) -> None:
    before, calls = world.digests(), teacher.calls
    done = world.run()
    assert done.stderr.count("reused") >= 10, done.stderr
    assert (world.digests(), teacher.calls) == (before, calls)


def test_another_target_starts_at_quantize(world: World, teacher: FakeTeacher) -> None:
    before = world.stages()
    target = json.loads(world.target.read_text("utf-8"))
    world.target.write_text(json.dumps({**target, "context_tokens": 192}), "utf-8")
    world.run("quantize")
    changed = {name for name, folder in world.stages().items() if before.get(name) != folder}
    assert changed == {"quantize"}


def test_allocations_go_a_way_of_their_own(world: World) -> None:
    target = json.loads(world.target.read_text("utf-8"))
    sized = {"name": "sized", "types": ["Q4_0", "Q5_0", "Q8_0"], "budget_mb": 1.1}
    sized |= {"importance": True}
    fit = {"method": "full", "epochs": 2, "batch_size": 8, "evaluations": 2, "start": "student"}
    sized |= {"fit": {"min_kld": 1e9}}  # close enough as it is
    small = {"name": "small", "types": ["Q4_0"], "vocabulary": 2}
    small |= {"drop_layers": 1, "fit": fit}
    gates = {"max_agreement_drop": 1.0, "max_nll_rise": 50.0}
    changed = {**target, "formats": ["Q8_0:imatrix"], "allocations": [sized, small], "gates": gates}
    world.target.write_text(json.dumps(changed), "utf-8")
    world.run()
    report = json.loads((world.bundle / "report.json").read_text("utf-8"))
    assert [c["format"] for c in report["candidates"]] == ["Q8_0:imatrix", "sized", "small"]
    assert report["format"] == "small"
    steps = [(link["step"], link["before"], link["after"]) for link in report["links"]]
    assert steps[2:] == [
        ("trim", "merged", "trimmed"),
        ("fit", "trimmed", "fitted"),
        ("quantize", "fitted", "quantized"),
    ]
    assert report["links"][-1]["mean_kld"] < 0.01  # kernels alone
    made_by = json.loads((world.bundle / "manifest.json").read_text("utf-8"))["provenance"]
    assert {"trim of small", "fit of small", "export of small", "prove"} <= set(made_by)
    assert "sensitivity of sized" not in made_by
    assert max(c["bytes"] for c in report["candidates"] if c["format"] == "sized") <= 1.1e6
    assert len(list(world.workspace.glob("unquantized-*"))) == 1  # whatever target is measured
    again = world.run()
    assert again.stderr.count(": running") == 0, again.stderr


def test_what_fitting_left_ships_as_an_allocated_file(world: World) -> None:
    target = json.loads(world.target.read_text("utf-8"))
    left = {"name": "left", "types": ["Q4_0", "Q5_0", "Q8_0"], "budget_mb": 1.1}
    left |= {"fit": {"min_kld": 1e9}}
    gates = {"max_agreement_drop": 1.0}
    changed = {**target, "formats": ["Q8_0"], "allocations": [left]}
    world.target.write_text(json.dumps({**changed, "gates": gates}), "utf-8")
    world.run()
    report = json.loads((world.bundle / "report.json").read_text("utf-8"))
    assert report["format"] == "left"
    assert [link["step"] for link in report["links"]] == ["merge", "export", "quantize"]
    for file in ("MODEL_CARD.md", "report.html"):
        text = (world.bundle / file).read_text("utf-8")
        assert "rounded to its number formats, the student was close" in text
    # It is held to what a stock file is held to: the teacher's answers did not move it.
    world.target.write_text(
        json.dumps({**changed, "gates": {**gates, "max_mean_kld": 1e-9}}), "utf-8"
    )
    refused = world.run(check=False)
    assert refused.returncode == 3
    assert re.search(r"left: mean KLD \S+ > 1e-09", refused.stderr), refused.stderr


def test_one_changed_prompt_is_one_call(world: World, teacher: FakeTeacher) -> None:
    calls = teacher.calls
    text = world.prompts.read_text("utf-8").replace("say the word 7", "say the word 777")
    world.prompts.write_text(text, "utf-8")
    world.run("collect")
    assert teacher.calls == calls + 1


def test_a_missed_gate_ends_the_build_and_leaves_the_report(world: World) -> None:
    file = world.home / "recipe" / "recipe.yaml"
    recipe = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**recipe, "gates": {"merged_agreement": 1.0}}), "utf-8")
    done = world.run(check=False)
    assert done.returncode == 3
    assert "'distill'" in done.stderr
    assert "merged_agreement" in done.stderr
    assert (world.stages()["bench"] / "report.html").is_file()
    shown = world.run("status")  # a build that ended so can still be looked at
    assert "bench" in shown.stdout
    assert "merged_agreement is" in shown.stdout


def test_a_gate_that_one_target_misses_keeps_no_other_from_being_made(world: World) -> None:
    target = json.loads(world.target.read_text("utf-8"))
    strict = json.dumps({**target, "name": "strict", "gates": {"max_file_mb": 0.01}})
    (world.home / "strict.yaml").write_text(strict, "utf-8")
    shutil.rmtree(world.bundle)
    asked = ("--target", "strict.yaml", "--target", "target.yaml")
    done = world.call("build", "--recipe", "recipe", *asked)
    assert done.returncode == 3
    assert "target strict: gate failed at step 'quantize'" in done.stderr
    assert re.search(r"tiny: made, \S*tiny-tiny", done.stderr)
    assert (world.bundle / MANIFEST).is_file()


def test_a_gate_that_every_target_misses_is_paid_for_once(world: World) -> None:
    file = world.home / "recipe" / "recipe.yaml"
    recipe = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**recipe, "gates": {"merged_agreement": 1.0}}), "utf-8")
    target = json.loads(world.target.read_text("utf-8"))
    other = json.dumps({**target, "name": "other", "context_tokens": 192})
    (world.home / "other.yaml").write_text(other, "utf-8")
    asked = ("--target", "target.yaml", "--target", "other.yaml")
    done = world.call("build", "--recipe", "recipe", *asked)
    assert done.returncode == 3
    assert "target tiny: gate failed at step 'distill'" in done.stderr
    assert "target other" not in done.stderr


def test_a_page_that_cannot_be_made_is_told_before_any_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = json.loads(world.target.read_text("utf-8"))
    gates = {**target["gates"], "max_file_mb": 100}
    page = {**target, "name": "page", "runtime": "wllama", "latency": "browser", "gates": gates}
    (world.home / "page.yaml").write_text(json.dumps(page), "utf-8")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    done = world.call("build", "--recipe", "recipe", "--target", "page.yaml")
    assert done.returncode == 1
    assert "which runs the model in a browser, is not kept here" in done.stderr
    assert "collect" not in done.stderr


def test_the_next_larger_candidate_is_tried_when_held_out_prompts_refuse_the_smallest(
    world: World, teacher: FakeTeacher
) -> None:
    bound = _leave_lucky_validation(world, "Q4_0")
    target = json.loads(world.target.read_text("utf-8"))
    gates = {**target["gates"], "max_mean_kld": bound}
    world.target.write_text(json.dumps({**target, "gates": gates}), "utf-8")
    calls = teacher.calls
    done = world.run()
    assert "held-out prompts refuse Q4_0: quantize: mean_kld is" in done.stderr
    assert teacher.calls - calls <= 2 * 4  # timed once; each of 4 prompts may be asked twice
    report = json.loads((world.bundle / "report.json").read_text("utf-8"))
    assert report["format"] == "Q8_0"
    (smaller,) = (c for c in report["candidates"] if c["format"] == "Q4_0")
    assert (smaller["passed"], smaller["chosen"]) == (False, False)
    assert smaller["why_not"].startswith("held-out prompts: quantize: mean_kld is")
    for text in (report["notes"], [(world.bundle / "MODEL_CARD.md").read_text("utf-8")]):
        assert any("they had a say in the choice" in note for note in text)
    made_by = json.loads((world.bundle / MANIFEST).read_text("utf-8"))["provenance"]
    assert len([name for name in made_by if name.startswith("quantize")]) == 1
    reports = [
        json.loads(f.read_text("utf-8")) for f in world.workspace.glob("bench-*/report.json")
    ]
    (refused,) = (r for r in reports if r["gates"] and not all(g["passed"] for g in r["gates"]))
    assert (refused["format"], refused["latencies"]) == ("Q4_0", [])
    plan = world.call("status", "--recipe", "recipe", "--target", "target.yaml", "--json")
    steps = json.loads(plan.stdout)["plan"]
    assert {state for _, state, _ in steps} == {"reused"}
    assert [name for name, *_ in steps].count("bench") == 2
    kept = world.call("gc", "--recipe", "recipe", "--target", "target.yaml", "--dry-run", "--json")
    condemned = json.loads(kept.stdout)["folders"]
    assert not {Path(folder).name for *_, folder in steps} & {Path(at).name for at in condemned}


def _leave_lucky_validation(world: World, name: str) -> float:
    """Make the smallest candidate's figures better than they are; a bound on the mean KLD between
    its real one and the next one's."""
    report = json.loads((world.bundle / "report.json").read_text("utf-8"))
    klds = [c["mean_kld"] for c in report["candidates"]]
    for folder in world.workspace.glob("candidate-*"):
        if list(folder.glob(f"*{name}.gguf")):
            figures = json.loads((folder / FIGURES).read_text("utf-8"))
            write_json(folder / FIGURES, {**figures, "mean_kld": 0.0})
            _redo_manifest(folder, folder / FIGURES)
    return float(np.sqrt(min(klds) * max(klds)))


def test_a_target_that_the_student_cannot_be_made_for_stops_no_housekeeping(world: World) -> None:
    allocation = {"name": "few", "types": ["Q4_0", "Q8_0"], "budget_mb": 0.01}
    given = json.loads(world.target.read_text("utf-8")) | {"name": "few"}
    targets = world.home / "targets"
    targets.mkdir(exist_ok=True)
    impossible = json.dumps({**given, "allocations": [allocation]})
    (targets / "few.yaml").write_text(impossible, "utf-8")
    asked = world.call("status", "--recipe", "recipe", "--target", "few", "--json")
    told = json.loads(asked.stdout)
    assert [text for text in told["ends"] if "few.budget_mb: 0.01 is below" in text]
    assert [name for name, *_ in told["plan"]] == ["student"]  # before the teacher is asked
    kept = world.call(
        "gc", "--recipe", "recipe", "--target", "target.yaml", "--dry-run", "--json"
    )  # fmt: skip
    assert kept.returncode == 0, kept.stderr
    assert not [at for at in json.loads(kept.stdout)["folders"] if "candidate" in at]
    (targets / "few.yaml").unlink()


def _swap_rows(values: Any) -> Any:
    changed = values.copy()
    changed[[0, 40]] = changed[[40, 0]]
    return changed


BREAKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "eos": ({"tokenizer.ggml.eos_token_id": 5}, {}, "eos"),
    "chat template": ({"tokenizer.chat_template": "{{ messages[0].content }}"}, {}, "template"),
    "rows permuted": ({}, {"blk.1.attn_k.weight": _swap_rows}, "blk.1.attn_k.weight"),
    "tokenizer type": ({"tokenizer.ggml.model": "llama"}, {}, "token"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_export_fails_the_build_and_is_named(world: World, name: str) -> None:
    keys, tensors, word = BREAKS[name]
    _leave_broken_export(world.stages()["export"], keys, tensors)
    done = world.run(check=False)
    assert done.returncode == 3
    assert "'export'" in done.stderr
    assert word in done.stderr.lower()


def _leave_broken_export(folder: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    """What a faulty export stage would have left: a complete folder around another file."""
    (model,) = folder.glob("*.gguf")
    broken = rewrite_gguf(model, folder.parent / "broken.gguf", keys, tensors)
    broken.replace(model)
    _redo_manifest(folder, model)


def _redo_manifest(folder: Path, changed: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    entry = {"sha256": digest_of_file(changed), "bytes": changed.stat().st_size}
    manifest["outputs"][changed.name] = entry
    named = {name: output["sha256"] for name, output in manifest["outputs"].items()}
    write_json(folder / MANIFEST, {**manifest, "digest": digest_of(named)})


def test_swapped_rows_differ() -> None:
    values = np.arange(82.0).reshape(41, 2)
    assert not np.array_equal(_swap_rows(values), values)
