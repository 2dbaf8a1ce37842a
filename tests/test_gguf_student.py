"""A GGUF of each family becomes the checkpoint it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_families import FAMILIES, family_student, fidelity, sentencepiece_keys

from edgedistill.artifacts import Student
from edgedistill.errors import WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import TOKENIZER_GGUF, prepare_student
from edgedistill.torch_runtime import load_model

BOUND = 1e-5


def as_gguf(folder: Path, name: str, **changes: Any) -> Path:
    student = family_student(folder / "source", name, **changes)
    file = folder / "base.gguf"
    tokenizer = student.folder / TOKENIZER_GGUF
    made_from = Provenance("r", "base", "MIT", "digest")
    write_gguf(student.folder, tokenizer, file, made_from, Silent(), encoding="F32")
    return file


def prepared(file: Path, out: Path) -> Student:
    return prepare_student(StudentSpec(weights=str(file)), out, Silent())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama 3"])
def test_a_gguf_becomes_its_checkpoint(tmp_path: Path, name: str) -> None:
    file = as_gguf(tmp_path, name)
    student = prepared(file, tmp_path / "out")
    found = fidelity(student.folder, file, tmp_path)
    assert found.mean_kld < BOUND
    load_model(student.folder)


def test_llama_3_keeps_its_rope(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    file = as_gguf(tmp_path, "llama 3", rope_parameters=rope)
    student = prepared(file, tmp_path / "out")
    config = json.loads((student.folder / "config.json").read_text("utf-8"))
    assert config["rope_parameters"] == rope
    assert fidelity(student.folder, file, tmp_path).mean_kld < BOUND


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("llama 3", {}, "rope_freqs.weight"),  # stretched in a way that no Llama is
        ("qwen2", {"qwen2.attention.clamp_kqv": 1.0}, "clamp_kqv"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type"),
        ("qwen3", {"qwen3.attention.key_length": 64}, "cannot|key_length|other"),
    ],
)
def test_what_transformers_leaves_out_is_refused(
    tmp_path: Path, name: str, keys: dict[str, Any], said: str
) -> None:
    file = as_gguf(tmp_path, name)
    if keys:
        file = rewritten(file, tmp_path / "changed.gguf", keys)
    with pytest.raises(WeightsError, match=said):
        prepared(file, tmp_path / "out")


def rewritten(
    source: Path, destination: Path, keys: dict[str, Any], architecture: str | None = None
) -> Path:
    """A copy with some keys changed or added."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    own = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(destination, architecture or own)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        element = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    adds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for name, value in keys.items():
        adds[type(value)](name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def test_a_turn_may_end_with_another_token_than_eos(tmp_path: Path) -> None:
    student = family_student(tmp_path, "gemma3", keys=sentencepiece_keys(False))
    prompt = StudentPrompt(student.folder, StudentSpec(weights="x"))
    assert prompt.decode([prompt.stop_id]) == "<|end|>"
    assert prompt.stop_ids == {2, prompt.stop_id}
    assert prompt.answer_ids("and")[-1] == prompt.stop_id
    assert prompt.prompt_ids("hi")[:2] == [1, prompt.encode("<|user|>")[0]]


def test_another_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    file = as_gguf(tmp_path, "llama")
    other = rewritten(file, tmp_path / "other.gguf", {}, "mamba")
    with pytest.raises(WeightsError, match=r"'mamba'.*Gemma 3"):
        prepared(other, tmp_path / "out")
