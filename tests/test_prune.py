"""Layers that the token mix misses least go before the student learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_families import family_student

from edgedistill.artifacts import Student
from edgedistill.errors import TargetError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.prune import prune, require_prunable
from edgedistill.recipe import PruneSpec, StudentSpec
from edgedistill.student import TOKENIZER_FILES
from edgedistill.torch_runtime import TorchModel

KINDS = "several kinds in a fixed order"


def spec(layers: int) -> StudentSpec:
    return StudentSpec(weights="tiny", prune=PruneSpec(drop_layers=layers))


def pruned(student: Student, layers: int, out: Path) -> Student:
    return prune(student, tiny.tiny_dataset(out / "data"), spec(layers), out, Silent())


def test_without_a_wish_it_is_the_student_itself(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    data = tiny.tiny_dataset(tmp_path / "data")
    assert prune(student, data, StudentSpec(weights="tiny"), tmp_path, Silent()) is student
    assert student.title == student.stem == student.name


def test_a_layer_that_adds_nothing_goes_and_predictions_stay(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "qwen3", num_hidden_layers=4)
    file = student.folder / "model.safetensors"
    values = load_file(file)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        values[f"model.layers.2.{name}.weight"][:] = 0
    save_file(values, file, metadata={"format": "pt"})

    made = pruned(student, 1, tmp_path / "out")
    assert made.layers == (0, 1, 3)
    assert made.title == "example/Tiny-2M-Instruct pruned to 3 of 4 layers"
    assert (made.name, made.licence, made.source) == (student.name, student.licence, student.source)
    ids = list(range(3, 40))
    (before,), (after,) = (TorchModel(each.folder).logits([(ids, 1)]) for each in (student, made))
    assert np.array_equal(before, after)
    for name in TOKENIZER_FILES:
        assert (made.folder / name).read_bytes() == (student.folder / name).read_bytes()
    assert pruned(student, 1, tmp_path / "out") == made  # reused, with its layers
    about = Provenance("r", made.name, "MIT", "digest")
    tokenizer = made.folder / "tokenizer.gguf.json"
    layout = write_gguf(made.folder, tokenizer, tmp_path / "model.gguf", about, Silent())
    assert layout.config["num_hidden_layers"] == 3


def test_two_layers_are_fewer_and_named(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "llama", num_hidden_layers=4)
    made = pruned(student, 2, tmp_path / "out")
    config = json.loads((made.folder / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == len(made.layers) == 2
    assert made.stem == "example/Tiny-2M-Instruct-2of4-layers"


def test_more_than_there_are_is_refused(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path)
    require_prunable(student, spec(1))
    with pytest.raises(TargetError, match=r"student\.prune: drop_layers is 2, and the model has 2"):
        require_prunable(student, spec(2))


def test_layers_of_several_kinds_are_refused(tmp_path: Path) -> None:
    student = family_student(tmp_path, "gemma3")
    with pytest.raises(TargetError, match=KINDS) as caught:
        require_prunable(student, spec(1))
    assert caught.value.hint == "leave student.prune out of the recipe"
