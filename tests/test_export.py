from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from edgedistill.artifacts import Checkpoint, Exported, Student
from edgedistill.errors import ArtifactError
from edgedistill.export import export
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.names import gguf_name, with_encoding
from edgedistill.progress import Silent
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.tensors import BLOCK_BYTES, Tensor, read_layout


def exported(student: Student, out: Path) -> Exported:
    checkpoint = Checkpoint(student.folder, "checkpoint")
    return export(checkpoint, student, "support-sql", out, Silent())


def stored(made: Exported) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in GGUFReader(made.model).tensors}


def permuted(values: Any, heads: int) -> Any:
    """The formula of llama.cpp's conversion/llama.py, LlamaModel.permute."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors(tmp_path: Path, architecture: str) -> None:
    student = tiny.tiny_student(tmp_path / "student", architecture=architecture)
    found = stored(exported(student, tmp_path / "out"))
    source = load_file(student.folder / "model.safetensors")
    reordered = architecture == "llama"
    heads = {"q": tiny.HEADS, "k": tiny.KV_HEADS}
    for layer in range(tiny.LAYERS):
        for short, count in heads.items():
            values = source[f"model.layers.{layer}.self_attn.{short}_proj.weight"]
            wanted = permuted(values, count) if reordered else values
            got = found[f"blk.{layer}.attn_{short}.weight"]
            np.testing.assert_array_equal(got, wanted.astype(np.float16))
    embedding = source["model.embed_tokens.weight"].astype(np.float16)
    np.testing.assert_array_equal(found["token_embd.weight"], embedding)
    np.testing.assert_array_equal(found["output_norm.weight"], source["model.norm.weight"])
    assert {name for name, values in found.items() if values.dtype == np.float32} == {
        name for name in found if "norm" in name or name.endswith(".bias")
    }
    assert len(found) == len(source)
    assert "output.weight" not in found  # tied


def test_keys(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    made = exported(student, tmp_path / "out")
    fields = {name: field.contents() for name, field in GGUFReader(made.model).fields.items()}
    for entry in json.loads((student.folder / TOKENIZER_GGUF).read_text("utf-8")):
        assert fields[entry["key"]] == entry["value"]
    assert made.model.name == "Tiny-2M-Instruct-support-sql-v1.0-F16.gguf"
    expected = {
        "general.architecture": "llama",
        "general.name": "Tiny-2M-Instruct support-sql",
        "general.basename": "Tiny",
        "general.size_label": "2M",
        "general.finetune": "Instruct-support-sql",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "Tiny-2M-Instruct",
        "general.base_model.0.repo_url": "https://huggingface.co/example/Tiny-2M-Instruct",
        "general.file_type": 1,
        "llama.block_count": tiny.LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": tiny.HIDDEN,
        "llama.feed_forward_length": tiny.WIDTH,
        "llama.attention.head_count": tiny.HEADS,
        "llama.attention.head_count_kv": tiny.KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": tiny.HIDDEN // tiny.HEADS,
        "edgedistill.recipe": "support-sql",
        "edgedistill.source_digest": "checkpoint",
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_matrices_can_stay_f32(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    file, made_from = tmp_path / "model.gguf", Provenance("r", "base", "MIT", "digest")
    tokenizer = student.folder / TOKENIZER_GGUF
    write_gguf(student.folder, tokenizer, file, made_from, Silent(), encoding="F32")
    reader = GGUFReader(file)
    assert {tensor.data.dtype for tensor in reader.tensors} == {np.dtype(np.float32)}
    assert reader.fields["general.file_type"].contents() == 0
    (down,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    source = load_file(student.folder / "model.safetensors")
    np.testing.assert_array_equal(down, source["model.layers.1.mlp.down_proj.weight"])


def test_the_same_export_has_the_same_digest(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    first, second = (exported(student, tmp_path / name) for name in "ab")
    assert first.digest == second.digest
    assert exported(student, tmp_path / "a").model == first.model


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")


def test_an_untied_head_is_written_and_a_tied_one_is_not(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    file = student.folder / "model.safetensors"
    source = load_file(file)
    head = source["model.embed_tokens.weight"][::-1].copy()
    save_file({**source, "lm_head.weight": head}, file, metadata={"format": "pt"})
    assert "output.weight" not in stored(exported(student, tmp_path / "tied"))
    change(student.folder, tie_word_embeddings=False)
    found = stored(exported(student, tmp_path / "untied"))
    np.testing.assert_array_equal(found["output.weight"], head.astype(np.float16))


def test_sharded_checkpoint(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "whole")
    parts = tmp_path / "parts"
    shutil.copytree(student.folder, parts)
    source = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    listed = {}
    for i, name in enumerate(source):
        listed[name] = f"model-{i % 2}.safetensors"
    for file in set(listed.values()):
        save_file({n: source[n] for n in source if listed[n] == file}, parts / file)
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}), "utf-8")
    split = exported(Student(parts, "p", student.name, "Apache-2.0", ""), tmp_path / "out")
    whole = stored(exported(student, tmp_path / "out"))
    for name, values in stored(split).items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.parametrize("heads", [None, 8])
def test_large_tensors_come_in_blocks(tmp_path: Path, heads: int | None) -> None:
    rows, columns = 4096, 3000
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    tensor = Tensor("w", "w", tmp_path / "w.safetensors", (rows, columns), np.float16, heads)
    blocks = list(tensor.blocks())
    assert len(blocks) > 2
    assert max(block.nbytes for block in blocks) <= BLOCK_BYTES / 2
    wanted = values if heads is None else permuted(values, heads)
    np.testing.assert_array_equal(np.concatenate(blocks), wanted.astype(np.float16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "only Llama and SmolLM2 .LlamaForCausalLM., "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "RoPE type yarn"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_cannot_be_exported_is_said(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    change(student.folder, **values)
    with pytest.raises(ArtifactError, match=message):
        exported(student, tmp_path / "out")


@pytest.mark.parametrize("odd", [1e5, np.nan])
def test_values_beyond_f16_are_named(tmp_path: Path, odd: float) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    file = student.folder / "model.safetensors"
    source = load_file(file)
    source["model.layers.1.mlp.up_proj.weight"][3, 3] = odd
    save_file(source, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        exported(student, tmp_path / "out")


def test_a_tensor_without_a_gguf_name(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    file = student.folder / "model.safetensors"
    save_file({**load_file(file), "model.extra.weight": np.ones(4, np.float32)}, file)
    with pytest.raises(ArtifactError, match=r"no GGUF name for model\.extra\.weight"):
        read_layout(student.folder)


@pytest.mark.parametrize(
    ("base", "parameters", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 1, "SmolLM2-135M-Instruct-sql-v1.0-Q8_0.gguf"),
        ("Qwen2.5-Coder-1.5B-Instruct", 1, "Qwen2.5-Coder-1.5B-Instruct-sql-v1.0-Q8_0.gguf"),
        ("smollm2-135m-instruct-q4_1", 1, "smollm2-135M-instruct-sql-v1.0-Q8_0.gguf"),
        ("My Model", 1_543_714_304, "My-Model-1.5B-sql-v1.0-Q8_0.gguf"),
        ("model", 134_515_008, "model-135M-sql-v1.0-Q8_0.gguf"),
    ],
)
def test_names(base: str, parameters: int, expected: str) -> None:
    assert gguf_name(base, parameters, "sql", "v1.0", "Q8_0") == expected
    assert with_encoding(expected, "Q4_K_M") == expected.replace("Q8_0", "Q4_K_M")
