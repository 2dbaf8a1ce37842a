"""What `validate` sees of a student: the header of a GGUF file, the JSON files of a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_folders import change, model_folder
from test_gguf_student import as_gguf, rewritten
from test_prune import KINDS
from tiny import rewrite_gguf

from edgedistill.converter import VARIABLE
from edgedistill.families import ARCHITECTURES, FAMILIES
from edgedistill.recipe import PruneSpec, StudentSpec
from edgedistill.student_file import proxy_problem, student_problem
from edgedistill.weights import CACHE_VARIABLE, KNOWN, HubModel
from edgedistill.weights.hub import COMPLETE

REVISION = "0" * 40
PAGE = Path(__file__).resolve().parents[1] / "docs" / "students.md"
SHOWN = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def problem(weights: Path | str, drop: int | None = None) -> str:
    prune = None if drop is None else PruneSpec(drop_layers=drop)
    found = student_problem(StudentSpec(weights=str(weights), prune=prune))
    return "" if found is None else f"{found.field}: {found.what}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "source")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that looks like one of llama.cpp's."""
    (tmp_path / "llama.cpp" / "conversion").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text("", "utf-8")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "llama.cpp"))


def test_sound_students_have_none(folder: Path, tmp_path: Path) -> None:
    assert problem(folder) == problem(folder, drop=1) == ""
    assert problem(as_gguf(tmp_path, "qwen3"), drop=1) == ""
    assert problem(f"some/model@{REVISION}") == ""


@pytest.mark.parametrize("text", SHOWN)
def test_what_the_docs_show_is_a_student(text: str, tmp_path: Path) -> None:
    model_folder(tmp_path / "my-model", "smollm2", num_hidden_layers=5)
    asked = yaml.safe_load(text)
    if asked["weights"] == "./my-model":
        asked["weights"] = str(tmp_path / "my-model")
    assert student_problem(StudentSpec.model_validate(asked)) is None


def test_the_docs_name_every_family_and_no_other() -> None:
    (told,) = re.findall(r"^of these families: (.*?)\.", PAGE.read_text("utf-8"), re.MULTILINE)
    names = {name for family in FAMILIES for name in family.name.split(" and ")}
    assert set(re.split(", | and ", told)) == names


@pytest.mark.parametrize("name", list(KNOWN))
def test_pinned_weights_are_of_known_families(name: str) -> None:
    assert KNOWN[name].architecture in ARCHITECTURES
    told = problem(name)
    assert told == "" if KNOWN[name].trainable else "cannot be a student yet" in told


def test_another_family_is_refused_with_the_list(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = rewritten(as_gguf(tmp_path, "llama"), tmp_path / "other.gguf", {}, "mamba")
    change(folder / "config.json", architectures=["MambaForCausalLM"])
    for weights in (other, folder):
        told = problem(weights)
        assert told.startswith("weights: ")
        assert "amba" in told
        assert "Gemma 3 (Gemma3ForCausalLM) and Phi-3 (Phi3ForCausalLM)" in told
        assert VARIABLE in told
        assert proxy_problem(str(weights)).endswith("; choose another proxy")


def test_a_proxy_is_called_one() -> None:
    assert "'gemma-3-270m-q4_k_m' cannot be a proxy yet" in proxy_problem("gemma-3-270m-q4_k_m")
    unknown = problem("no-such").removeprefix("weights: ")
    assert proxy_problem("no-such") == unknown
    assert "gemma-3-270m" not in unknown
    assert proxy_problem("smollm2-135m-instruct-q4_1") == ""


@pytest.mark.usefixtures("checkout")
def test_with_the_converter_it_is_not(folder: Path, tmp_path: Path) -> None:
    other = rewritten(as_gguf(tmp_path, "llama"), tmp_path / "other.gguf", {}, "mamba")
    change(folder / "config.json", architectures=["MambaForCausalLM"])
    assert problem(other) == problem(folder) == ""
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert "code of its own" in problem(folder)


def test_a_fetched_hub_model_is_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = HubModel("some/model", REVISION)
    change(folder / "config.json", architectures=["MambaForCausalLM"])
    model.folder.parent.mkdir(parents=True)
    folder.rename(model.folder)
    assert problem(str(model)) == ""  # not whole yet
    (model.folder / COMPLETE).write_text("{}", "utf-8")
    assert "'MambaForCausalLM' cannot be trained" in problem(str(model))


def test_without_a_chat_template_it_is_refused(folder: Path, tmp_path: Path) -> None:
    file = as_gguf(tmp_path, "llama")
    bare = rewrite_gguf(file, tmp_path / "bare.gguf", {"tokenizer.chat_template": None})
    change(folder / "tokenizer_config.json", chat_template=None)
    for weights in (bare, folder):
        assert "no chat template" in problem(weights)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"architectures": "x"}, "None cannot be trained"),
    ],
)
def test_a_config_that_cannot_be(folder: Path, changes: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **changes)
    assert said in problem(folder)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    assert "there is no file" in problem(tmp_path / "x.gguf")
    assert "there is no folder" in problem(tmp_path / "x")
    assert "there is no config.json" in problem(tmp_path)
    assert "no pinned weights 'smol'" in problem("smol")
    assert "needs its full revision" in problem("some/model@main")


def test_pruning_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    gemma = model_folder(tmp_path / "gemma", "gemma3")
    assert problem(folder, drop=2) == "prune: drop_layers is 2, and the model has 2 layers"
    for weights in (gemma, as_gguf(tmp_path, "gemma3")):
        assert KINDS in problem(weights, drop=1)
    assert "has 2 layers" in problem(as_gguf(tmp_path / "q", "qwen2"), drop=5)
