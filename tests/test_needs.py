"""What a recipe needs, and how one for large machines runs on this one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hf_folders import change, model_folder
from hub_server import REPO, REVISION, files_of, serving
from tiny import tiny_student

from edgedistill import machine
from edgedistill.doctor import Finding
from edgedistill.initialise import UNTOUCHED, initialise
from edgedistill.library import shipped_root
from edgedistill.methods import LoraSpec, OnPolicySpec, ProxySpec
from edgedistill.needs import needs
from edgedistill.recipe import LocalTeacher, PruneSpec, Recipe, load_recipe
from edgedistill.scaled import SUFFIX, scale_down
from edgedistill.tokenmix import read_token_mix
from edgedistill.weights import CACHE_VARIABLE

LARGE = ("sql-24gb", "sql-8gpu")


def shipped(name: str, **distill: Any) -> Recipe:
    recipe = load_recipe(shipped_root() / "recipes" / name)
    spec = recipe.distill.model_copy(update=distill)
    return recipe.model_copy(update={"distill": spec})


def with_student(recipe: Recipe, folder: Path) -> Recipe:
    student = recipe.student.model_copy(update={"weights": str(folder)})
    return recipe.model_copy(update={"student": student})


def told(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return tiny_student(tmp_path / "student").folder


def test_what_is_missing_is_told_with_what_to_do(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recipe = with_student(shipped("sql-8gpu", tuning="qlora", processes=1000), student)
    found = told(needs(recipe, tmp_path))
    assert found["key OPENAI_API_KEY"].state == "missing"
    assert found["teacher"].value.startswith("at most 502 calls to gpt-4.1 ")
    assert ", about 101 more to time it" in found["teacher"].value
    assert found["student"].value.endswith("0.00 billion parameters")
    assert (found["processes"].state, found["processes"].value[:11]) == ("missing", "1000 wanted")
    assert found["training memory"].state == "ok"
    if not machine.gpu_names():
        assert found["tuning"].state == "note"
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    alone = with_student(shipped("sql-24gb", tuning="lora"), student)
    assert all(finding.state == "ok" for finding in needs(alone, tmp_path))


def test_a_proxy_is_told_with_the_disk_that_it_takes(student: Path, tmp_path: Path) -> None:
    spec = ProxySpec(weights=str(student))
    recipe = with_student(shipped("sql-24gb", method="proxy", proxy=spec, tuning="lora"), student)
    found = told(needs(recipe, tmp_path))
    assert found["proxy"].value == f"{student}, 0.00 billion parameters"
    assert found["proxy memory"].state == "ok"
    assert re.search(r"\(student 0.0, proxy 0.0\)", found["disk"].value)
    small, _ = scale_down(recipe)
    assert small.distill.proxy is not None
    assert small.distill.proxy.min_agreement == 0


def test_the_calls_for_feedback_and_those_that_are_timed(student: Path, tmp_path: Path) -> None:
    feedback = OnPolicySpec(feedback="judge", max_calls=77)
    recipe = with_student(shipped("sql-24gb", method="on-policy", on_policy=feedback), student)
    few = recipe.model_copy(update={"sample": 40})
    value = told(needs(few, tmp_path))["teacher"].value
    assert re.search(
        r"at most 40 calls .*, about 10 more to time it, and at most 77 for feedback", value
    )


def test_an_untouched_template_is_told(tmp_path: Path) -> None:
    recipe = load_recipe(initialise("mine", tmp_path))
    found = told(needs(recipe, tmp_path))["teacher"]
    assert (found.state, found.hint) == ("missing", UNTOUCHED[1])
    assert found.value.startswith("teacher.model is still the template's; at most 4 calls")


def grown(folder: Path, width: int) -> None:
    file = folder / "config.json"
    text = file.read_text("utf-8").replace('"hidden_size": 256', f'"hidden_size": {width}')
    file.write_text(text, "utf-8")


@pytest.mark.parametrize("learns", [{}, {"warm_up_epochs": 0, "rounds": 0}])
def test_a_proxy_that_is_too_large_is_told(
    learns: dict[str, Any], student: Path, tmp_path: Path
) -> None:
    large = tiny_student(tmp_path / "large").folder
    grown(large, 4_194_304)
    spec = ProxySpec(weights=str(large), **learns)
    recipe = with_student(shipped("sql-24gb", method="proxy", proxy=spec, tuning="lora"), student)
    found = told(needs(recipe, tmp_path))
    states = {name: found[name].state for name in ("training memory", "proxy memory", "disk")}
    assert states == {"training memory": "ok", "proxy memory": "missing", "disk": "missing"}
    assert ("to load it" in found["proxy memory"].value) == bool(learns)


def test_a_student_that_is_too_large_is_told(student: Path, tmp_path: Path) -> None:
    grown(student, 262144)
    found = told(needs(with_student(shipped("sql-24gb"), student), tmp_path))
    assert found["training memory"].state == "missing"
    assert found["disk"].state == "missing"


HUB = f"{REPO}@{REVISION}"


def hub_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lora: int = 4, drop: int = 1
) -> dict[str, Finding]:
    """What is told of a hub student, of which only config.json may be fetched."""
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    recipe = shipped("support-sql", lora=LoraSpec(rank=lora))
    changes = {"weights": HUB, "prune": PruneSpec(drop_layers=drop)}
    asked = recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})
    return told(needs(asked, folder))


@pytest.mark.parametrize(
    ("asked", "changes", "row", "said"),
    [
        ({}, {}, "student", ""),
        ({"lora": 512}, {}, "student's rank", r"lora.rank is 512, and .* is only \d+ wide"),
        ({"drop": 99}, {}, "student.prune", r"drop_layers is 99, and the model has \d+ layers"),
        ({}, {"architectures": ["MambaForCausalLM"]}, "student", "'MambaForCausalLM' cannot be"),
    ],
)
def test_a_hub_model_is_held_against_the_recipe_before_its_weights_are_fetched(
    asked: Any, changes: Any, row: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "source")
    change(folder / "config.json", **changes)
    with serving(files_of(folder)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = hub_rows(tmp_path, monkeypatch, **asked)
    assert hub.fetched()[1:] == ["config.json"]
    assert found[row].state == ("missing" if said else "ok")
    assert re.search(said, found[row].value)


def test_a_hub_proxy_of_another_family_is_refused(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "source")
    change(folder / "config.json", architectures=["MambaForCausalLM"])
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    spec = ProxySpec(weights=HUB)
    recipe = with_student(shipped("sql-24gb", method="proxy", proxy=spec), student)
    with serving(files_of(folder)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = told(needs(recipe, tmp_path))
    assert "'MambaForCausalLM' cannot be trained" in found["proxy"].value
    assert found["proxy"].hint == "choose another proxy"
    assert found["proxy memory"].value == "not known yet"
    assert (found["disk"].state, found["disk"].hint[:9]) == ("note", "the proxy")


def test_without_a_network_it_is_told_what_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = hub_rows(tmp_path, monkeypatch)
    assert "cannot be reached" in found["student"].value
    assert {"teacher", "processes"} <= set(found)
    for name in ("training memory", "disk"):
        assert (found[name].state, found[name].value) == ("note", "not known yet")


@pytest.mark.parametrize("name", LARGE)
def test_scaled_down_it_asks_no_api_and_no_gpu(name: str, tmp_path: Path) -> None:
    large = shipped(name)
    small, changes = scale_down(large)
    assert small.name == name + SUFFIX
    assert isinstance(small.teacher, LocalTeacher)
    assert small.teacher.system == large.teacher.system
    assert small.distill.method == large.distill.method
    assert f"collect.concurrency 1 instead of {large.collect.concurrency}" in changes
    assert (small.distill.processes, small.distill.tuning) == (1, "lora")
    assert len(read_token_mix(small.prompts, small.sample).entries) == 80
    assert any("instead of gpt-4.1" in line for line in changes)
    assert any(line.startswith("distill.lora.rank 16 instead of") for line in changes)
    assert "gates.merged_agreement None instead of 0.9" in changes
    assert changes[-1].startswith("this shows that the recipe runs; its agreement tells nothing")
    for lora in (small.distill.lora, large.distill.lora):
        assert lora.alpha / lora.rank == 2
    states = {finding.name: finding.state for finding in needs(small, tmp_path)}
    assert "missing" not in states.values()
    assert not any(name.startswith("key ") for name in states)


def test_a_larger_sample_holds_a_smaller_one() -> None:
    prompts = shipped("sql-24gb").prompts
    few, many, every = (read_token_mix(prompts, count).entries for count in (10, 40, None))
    assert (len(few), len(many), len(every)) == (10, 40, 502)
    assert [entry for entry in every if entry in many] == list(many)
    assert [entry for entry in many if entry in few] == list(few)
