"""What `validate` tells before anything is asked or trained: ranks and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_folders import model_folder

from edgedistill.errors import ConfigError
from edgedistill.library import shipped_root
from edgedistill.validate import validate


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
    ("place", "said"),
    [("nowhere", "there is no such folder"), ("source", ".*there is no adapter_config.json")],
)
def test_an_adapter_that_is_none_is_told(tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"merge.adapters: .*{place}: {said}"):
        validate([recipe(tmp_path, more=f"merge: {{adapters: [{{path: ./{place}}}]}}\n")], [])
