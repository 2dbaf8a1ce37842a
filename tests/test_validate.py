"""What `validate` tells before anything is asked or trained: ranks and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_folders import model_folder

from edgedistill.errors import ConfigError
from edgedistill.library import shipped_root
from edgedistill.sizes import PINNED, known_dimensions, of_header
from edgedistill.validate import load_together, validate
from edgedistill.weights import CACHE_VARIABLE, FOLDERS_VARIABLE, KNOWN, cached

SMALLEST = "smollm2-135m-instruct-q4_1"


def recipe(folder: Path, rank: int = 4, more: str = "") -> Path:
    """A recipe whose student is a tiny folder beside it."""
    support = shipped_root() / "recipes" / "support-sql"
    model_folder(folder / "source")
    text = (support / "recipe.yaml").read_text("utf-8")
    for name in ("prompts.jsonl", "teacher-system.txt", "tickets.db"):
        text = text.replace(f": {name}", f": {json.dumps(str(support / name))}")
    text = text.replace("weights: smollm2-135m-instruct-q4_1", "weights: ./source")
    text = text.replace("rank: 32", f"rank: {rank}")
    (folder / "recipe.yaml").write_text(text + more, "utf-8")
    return folder / "recipe.yaml"


def test_a_sound_one_is_valid(tmp_path: Path) -> None:
    assert validate([recipe(tmp_path)], [])["recipes"] == {"support-sql": 502}


def test_a_rank_above_a_layers_width_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 512, and a layer of .* only (\d+) wide; at most \1"):
        validate([recipe(tmp_path, rank=512)], [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rank: 32", "rank: 256", r"distill.lora.rank: is 256, and a layer of .* only 192 wide"),
        (
            "q4_1\n",
            "q4_1\n  prune: {drop_layers: 30}\n",
            r"student.prune: .* 30, and .* has 30 layers",
        ),
    ],
)
def test_of_pinned_weights_that_is_told_before_they_are_fetched(
    old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)
    file = recipe(tmp_path, rank=32)
    text = file.read_text("utf-8").replace("weights: ./source", f"weights: {SMALLEST}")
    file.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=rf"recipe.yaml:\d+: {said}"):
        validate([file], [])


def test_sizes_of_pinned_weights_are_those_of_their_headers() -> None:
    assert PINNED.keys() == {name for name, pin in KNOWN.items() if pin.trainable}
    for name in PINNED:
        if (file := cached(name)) is not None:
            assert known_dimensions(name) == of_header(file)


@pytest.mark.parametrize(
    ("place", "said"),
    [("nowhere", "there is no such folder"), ("source", ".*there is no adapter_config.json")],
)
def test_an_adapter_that_is_none_is_told(tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"merge.adapters: .*{place}: {said}"):
        validate([recipe(tmp_path, more=f"merge: {{adapters: [{{path: ./{place}}}]}}\n")], [])


def test_further_prompts_are_read_before_a_proxy_is_trained_for_them(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"id": "a", "prompt": "One more?"}\n{\n', "utf-8")
    file = recipe(tmp_path)
    proxy = f"distill:\n  proxy: {{weights: {SMALLEST}, prompts: more.jsonl}}\n"
    file.write_text(file.read_text("utf-8").replace("distill:\n", proxy), "utf-8")
    with pytest.raises(ConfigError, match=r"more.jsonl:2: .*not a JSON object") as caught:
        load_together(file, [])
    assert len(caught.value.problems) == 1
