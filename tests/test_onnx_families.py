"""What onnxruntime-genai computes from each family's export is what torch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import LINEAR, SMALL, family_student, kld, random_ids, sentencepiece_keys

from edgedistill.errors import ArtifactError
from edgedistill.families import even_context
from edgedistill.fit.formats import quantize_dequantize
from edgedistill.hard_texts import HARD
from edgedistill.onnx_builder import build_onnx, refuse_unknown, write_onnx_tokenizer
from edgedistill.onnx_runtime import OnnxGenai
from edgedistill.prompting import StudentPrompt
from edgedistill.quantized_values import read_matrices, stored_together
from edgedistill.recipe import StudentSpec
from edgedistill.student import write_tokenizer
from edgedistill.tensors import read_layout
from edgedistill.torch_runtime import TorchModel

BOUND = 1e-9  # nats; measured: 1e-12 to 3e-12
TOKENS = 160  # beyond every window here


def measured(checkpoint: Path, model: Path, first: int) -> float:
    """Mean KLD where `first` tokens come at once and the others one by one."""
    ids, file = random_ids(TOKENS), checkpoint / "logits.f32"
    (wanted,) = TorchModel(checkpoint).logits([(ids, first)])
    with OnnxGenai(model, threads=1, context_tokens=TOKENS) as runtime:
        runtime.logits(ids, first, file)
    found = np.fromfile(file, np.float32).reshape(TOKENS - first, -1)
    file.unlink()
    return float(kld(wanted, found).mean())


# The others are exported in integration/test_families_end_to_end.py.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama 3", {}),
        ("llama", {"rope_parameters": LINEAR}),
        ("mistral with a window", {}),
        ("phi3", {}),
        ("phi3 long", {}),
        ("phi4 mini", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_logits_are_those_of_the_checkpoint(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    family_student(tmp_path / "student", name, **changes)
    build_onnx(tmp_path / "student", tmp_path / "made", "fp32")
    assert measured(tmp_path / "student", tmp_path / "made", first=1) < BOUND
    assert measured(tmp_path / "student", tmp_path / "made", first=TOKENS - 2) < BOUND


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_matrices_are_quantized_by_name(tmp_path: Path, name: str) -> None:
    import torch

    student = family_student(tmp_path / "student", name, num_hidden_layers=2, layer_types=None)
    layout = read_layout(student.folder, "F32")
    nodes = stored_together(layout, onnx=True)
    wide = {nodes[at] for at in ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight")}
    types = {at: "int8-b32" if node in wide else "int4-b32" for at, node in nodes.items()}
    build_onnx(student.folder, tmp_path / "made", "int4-b32", types=types)
    held = read_matrices(tmp_path / "made", layout)
    assert held.keys() == types.keys()
    assert ("output.weight" if name == "phi3" else "token_embd.weight") in types
    for tensor in layout.tensors:
        if tensor.name in types:
            values = torch.from_numpy(np.concatenate(list(tensor.blocks())))
            wanted = quantize_dequantize(values, types[tensor.name], None)
            assert torch.equal(wanted, torch.from_numpy(held[tensor.name]())), tensor.name


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student with a SentencePiece tokenizer, and in it `made`, its ONNX model."""
    folder = tmp_path_factory.mktemp("phi3")
    family_student(folder, "phi3", keys=sentencepiece_keys(True), **SMALL)
    build_onnx(folder, folder / "made", "fp32")
    return folder


def test_a_context_may_be_shorter_than_the_window(phi3: Path) -> None:
    with OnnxGenai(phi3 / "made", threads=1, context_tokens=64) as runtime:
        assert len(runtime.logits(random_ids(64), 60, phi3 / "logits.f32")) == 4


def test_genai_stops_where_a_turn_ends(phi3: Path) -> None:
    student = StudentPrompt(phi3, StudentSpec(weights="tiny"))
    assert len(student.stop_ids) == 2
    with OnnxGenai(phi3 / "made", threads=1) as runtime:
        assert runtime.end_ids() == student.stop_ids


@pytest.mark.parametrize(
    ("space_prefix", "name"), [(False, "Gemma"), (True, "Llama 2"), (True, "Phi-3")]
)
def test_sentencepiece_is_cut_as_in_training(phi3: Path, space_prefix: bool, name: str) -> None:
    keys = sentencepiece_keys(space_prefix, own=("[mark]", "x1"))
    write_tokenizer(phi3, keys, name)  # Phi-3's loses white space behind special tokens
    write_onnx_tokenizer(phi3, phi3 / "made")
    student = StudentPrompt(phi3, StudentSpec(weights="tiny"))
    texts = [text for text in HARD if "\0" not in text]  # which ends a text in C
    texts += [student.render("the  thing\n\n  and on"), "<|user|> \n the", "[mark]  a"]
    with OnnxGenai(phi3 / "made", threads=1) as runtime:
        assert [runtime.tokenize(text) for text in texts] == [*map(student.encode, texts)]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma3", {"rope_parameters": {"full_attention": LINEAR}}, "RoPE type linear"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "only default and linear"),
        ("llama", {"partial_rotary_factor": 0.5}, "only Phi-3's"),
        ("llama", {"architectures": ["OlmoForCausalLM"]}, "only Llama and SmolLM2"),
    ],
)
def test_what_the_builder_computes_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    family_student(tmp_path, name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ArtifactError, match=said):
        refuse_unknown(tmp_path)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama", 512), ("mistral with a window", 512), ("phi3", 512), ("phi3 long", 256)],
)
def test_context_is_as_long_as_it_is_exact(tmp_path: Path, name: str, tokens: int) -> None:
    family_student(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    found, why = even_context(config)
    assert (found, why is None) == (tokens, tokens == 512)
