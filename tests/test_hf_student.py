"""A Hugging Face folder of each family becomes the student that it is, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hf_folders import change, model_folder, save_tokenizer, train_byte_level
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, sentencepiece_keys

from edgedistill.artifacts import Student, TokenMixEntry
from edgedistill.errors import WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.merge import require_fp32
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.student import TOKENIZER_GGUF, prepare_student
from edgedistill.torch_runtime import TorchModel

IDS = list(range(3, 60))


def prepared(source: Path, **asked: Any) -> Student:
    spec = StudentSpec(weights=str(source))
    return prepare_student(spec, source.parent / "out", Silent(), **asked)


def logits(folder: Path) -> Any:
    (found,) = TorchModel(folder).logits([(IDS, 1)])
    return found


@pytest.mark.parametrize("name", list(FAMILIES))
def test_each_family_computes_what_its_folder_does(tmp_path: Path, name: str) -> None:
    keys = sentencepiece_keys(False) if name == "gemma3" else None
    source = model_folder(tmp_path / "source", name, keys=keys)
    student = prepared(source)
    assert np.array_equal(logits(source), logits(student.folder))
    require_fp32(student.folder)
    about = Provenance("r", student.name, "MIT", "digest")
    gguf = tmp_path / "student.gguf"
    write_gguf(student.folder, student.folder / TOKENIZER_GGUF, gguf, about, Silent())
    assert (student.name, student.licence) == ("source", "unknown")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_shards_becomes_fp32(tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = model_folder(tmp_path / "source", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="1MB")
    assert (source / "model.safetensors.index.json").is_file()
    student = prepared(source)
    require_fp32(student.folder)
    own = load_file(student.folder / "model.safetensors")
    for name, values in model.state_dict().items():
        assert name not in own or np.array_equal(values.float().numpy(), own[name])


def test_the_same_folder_is_the_same_student_and_a_changed_one_another(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    first = prepared(source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n", "utf-8")
    assert prepared(source).folder == first.folder  # a card changes no weights
    change(source / "generation_config.json", pad_token_id=3)
    again = prepared(source)
    assert again.folder != first.folder
    assert again.licence == "my-terms"


def entries(*prompts: str) -> list[TokenMixEntry]:
    return [
        TokenMixEntry(f"p{i}", ({"role": "user", "content": text},))
        for i, text in enumerate(prompts)
    ]


def test_prompts_of_the_token_mix_are_compared_too(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    assert prepared(source, asked=entries("how many?", "12 the")).digest
    assert list((tmp_path / "out").glob("tokens-*/manifest.json"))


def as_it_is(source: Path) -> None:
    """Nothing to change."""


def without_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def without_a_tensor(source: Path) -> None:
    values = load_file(source / "model.safetensors")
    del values["model.layers.1.mlp.up_proj.weight"]
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})


def with_a_tensor(source: Path) -> None:
    values = load_file(source / "model.safetensors")
    values["model.vision.weight"] = np.zeros((2, 2), np.float32)
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})


def with_integers(source: Path) -> None:
    values = load_file(source / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"].astype(np.int8)
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})


def outside(source: Path) -> None:
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def torn(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "config", "said"),
    [
        (without_weights, {}, "only pytorch_model.bin, which could run code"),
        (without_a_tensor, {}, "lack model.layers.1.mlp.up_proj.weight"),
        (with_a_tensor, {}, "hold model.vision.weight"),
        (with_integers, {}, "model.norm.weight is I8"),
        (outside, {}, "no file beside it"),
        (torn, {}, "cannot be read"),
        (as_it_is, {"architectures": ["MambaForCausalLM"]}, r"'MambaForCausalLM'.*Gemma 3"),
        (as_it_is, {"architectures": None}, "None cannot be trained"),
        (as_it_is, {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        (as_it_is, {"hidden_act": "gelu"}, "activation gelu"),
        (as_it_is, {"intermediate_size": 300}, "has another shape|cannot read it"),
    ],
)
def test_what_cannot_be_a_student_is_refused(
    tmp_path: Path, spoil: Any, config: dict[str, Any], said: str
) -> None:
    source = model_folder(tmp_path / "source")
    spoil(source)
    change(source / "config.json", **config)
    with pytest.raises(WeightsError, match=said):
        prepared(source)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    """Phi-3 says auto_map and is a family of ours: transformers has the class itself."""
    source = model_folder(tmp_path / "source", "phi3")
    (source / "modeling_own.py").write_text("raise SystemExit('was run')\n", "utf-8")
    change(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    student = prepared(source)
    assert "auto_map" not in json.loads((student.folder / "config.json").read_text("utf-8"))


def test_a_template_that_would_never_stop_is_refused(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    change(source / "tokenizer_config.json", chat_template=tiny.TEMPLATE.replace("<|im_end|>", ""))
    with pytest.raises(WeightsError, match="never stop"):
        prepared(source)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"chat_template": [1]}),
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}),
        ("tokenizer.json", {"added_tokens": None}),
        ("config.json", {"num_hidden_layers": "two"}),
        ("config.json", {"vocab_size": 3}),
        ("generation_config.json", {"pad_token_id": 99999}),
    ],
)
def test_damaged_files_are_errors_of_one_line(
    tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    source = model_folder(tmp_path / "source")
    if file == "generation_config.json":
        change(source / "tokenizer_config.json", pad_token=None)
    change(source / file, **changes)
    with pytest.raises(WeightsError) as caught:
        prepared(source)
    assert (caught.value.where or "").startswith(str(source))


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    save_tokenizer(source, train_byte_level("gpt-2"))
    with pytest.raises(WeightsError, match="the model's embedding"):
        prepared(source)
