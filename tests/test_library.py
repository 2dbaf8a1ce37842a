"""Where recipes and targets are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.library import entries, find, shipped_root


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", "utf-8")
    return path


def test_shipped_ones_are_found_from_anywhere(tmp_path: Path) -> None:
    assert find("target", "laptop", tmp_path) == shipped_root() / "targets" / "laptop.yaml"
    assert {entry.origin for entry in entries("recipe", tmp_path)} == {"shipped"}


def test_yours_hide_shipped_ones(tmp_path: Path) -> None:
    mine = put(tmp_path / "targets" / "laptop.yaml")
    assert find("target", "laptop", tmp_path) == mine
    (laptop,) = [entry for entry in entries("target", tmp_path) if entry.name == "laptop"]
    assert laptop.origin == "yours"


def test_the_repository_itself_lists_each_once() -> None:
    names = [entry.name for entry in entries("target", shipped_root())]
    assert len(names) == len(set(names))


def test_paths(tmp_path: Path) -> None:
    recipe = put(tmp_path / "some" / "recipe.yaml")
    target = put(tmp_path / "odd-name.yml")
    assert find("recipe", "some", tmp_path) == recipe
    assert find("recipe", "some/recipe.yaml", tmp_path) == recipe
    assert find("target", str(target)) == target


def test_unknown_names_suggest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean metal\?"):
        find("target", "mettal", tmp_path)
    with pytest.raises(UsageError) as caught:
        find("target", "zzzzzz", tmp_path)
    assert "did you mean" not in str(caught.value)
    assert caught.value.exit_code == 2
