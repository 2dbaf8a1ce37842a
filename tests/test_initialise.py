"""`init`: what it writes is valid, complete and explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.initialise import initialise, recipe_text
from edgedistill.methods import DistillSpec
from edgedistill.recipe import Recipe, load_recipe


def test_defaults_are_the_models_own(tmp_path: Path) -> None:
    recipe = load_recipe(initialise("my-task", tmp_path))
    assert recipe.name == "my-task"
    assert recipe.distill == DistillSpec()


def test_every_field_is_there_with_its_description() -> None:
    text = recipe_text("my-task")
    for name, field in Recipe.model_fields.items():
        assert re.search(rf"\n(# )?{name}:", text)
        assert (field.description or "") in text
    assert "# system_file:" in text
    assert "  # proxy:  # Proxy-KD" in text
    assert "  #   min_agreement: 0.7  # " in text
    assert "adapters: []  # their updates are added, e.g. [{path: ../tone, weight: 1}]" in text
    assert not re.search(r"[:;] none\b|often none", text.replace("0: none", ""))
    assert "merge_mean_kld: 1.0e-06" in text  # YAML 1.1 reads 1e-06 as text


def test_the_commands_on_top_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, asked in (("recipes", "mine"), ("elsewhere", "elsewhere/mine")):
        text = initialise("mine", Path(folder)).read_text("utf-8")
        assert f"edgedistill build --recipe {asked} --target laptop" in text


@pytest.mark.parametrize("name", ["", "Bad", "a/b", "../up", "-x"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        initialise(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_shipped_recipe_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="yours would hide it"):
        initialise("support-sql", tmp_path / "recipes")
    assert initialise("support-sql", tmp_path / "elsewhere").is_file()
