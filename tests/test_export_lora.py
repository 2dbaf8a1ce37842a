from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.numpy import load_file, save_file
from tiny_families import family_student

from edgedistill.artifacts import Adapter, Checkpoint, Student
from edgedistill.errors import ArtifactError, RuntimeFailure
from edgedistill.export import export
from edgedistill.export.lora import CONFIG, WEIGHTS, LoraFile, export_lora
from edgedistill.gguf_header import read_header
from edgedistill.progress import Silent
from edgedistill.runtime import LlamaCpp

PROMPT = "<|im_start|>user\nthe others in the canoe<|im_end|>\n"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def made_adapter(
    student: Student, folder: Path, rank: int = 32, alpha: float = 16.0, rslora: bool = False
) -> Adapter:
    """Random LoRA weights for every linear layer of a tiny student, in peft's layout."""
    chance, tensors = np.random.default_rng(5), {}
    for name, weight in load_file(student.folder / "model.safetensors").items():
        if "proj.weight" in name:
            at = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            a = chance.standard_normal((rank, columns), np.float32) / columns**0.5
            b = chance.standard_normal((rows, rank), np.float32) / rank**0.5
            tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    config |= {"use_rslora": rslora}
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    return Adapter(folder, f"adapter-{rank}", 1)


def base_file(student: Student, out: Path) -> Path:
    return export(Checkpoint(student.folder, "c"), student, "base", out, Silent()).model


def merged_file(student: Student, adapter: Adapter, out: Path) -> Path:
    """The same model with W + alpha / rank * B A in its weights, or by the root of the rank."""
    config = json.loads((adapter.folder / CONFIG).read_text("utf-8"))
    pairs = load_file(adapter.folder / WEIGHTS)
    weights = load_file(student.folder / "model.safetensors")
    for name in weights:
        at = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{at}.lora_A.weight" in pairs:
            product = pairs[f"{at}.lora_B.weight"] @ pairs[f"{at}.lora_A.weight"]
            divisor = config["r"] ** (0.5 if config["use_rslora"] else 1)
            weights[name] += config["lora_alpha"] / divisor * product
    save_file(weights, student.folder / "model.safetensors", metadata={"format": "pt"})
    return base_file(student, out)


def exported(
    tmp_path: Path, architecture: str = "llama", type: str = "F16", **given: Any
) -> tuple[Student, Adapter, Path, LoraFile]:
    student = family_student(tmp_path / "student", architecture)
    adapter = made_adapter(student, tmp_path / "adapter", **given)
    base = base_file(student, tmp_path / "out")
    lora = export_lora(adapter, student, base, "sql", tmp_path / "out", Silent(), type)
    return student, adapter, base, lora


@pytest.mark.parametrize(
    ("architecture", "type", "given"),
    [
        ("llama", "F32", {}),
        ("llama", "F16", {}),
        ("llama", "Q8_0", {}),
        ("llama", "F16", {"rslora": True, "alpha": 2.0}),
        ("mistral", "F16", {}),
        ("qwen2", "Q8_0", {}),
        ("qwen3", "F16", {}),
        ("gemma3", "F16", {"rslora": True, "alpha": 2.0}),
        ("phi3", "Q8_0", {}),
    ],
)
def test_base_and_adapter_answer_as_the_merged_model(
    tmp_path: Path, architecture: str, type: str, given: dict[str, Any]
) -> None:
    student, adapter, base, lora = exported(tmp_path, architecture, type, **given)
    merged = merged_file(student, adapter, tmp_path / "merged")
    with LlamaCpp(base, threads=1, adapter=lora.model) as runtime:
        ids = runtime.tokenize(PROMPT)
        runtime.logits(ids, 1, tmp_path / "adapted.f32")
    for name, model in (("merged", merged), ("base", base)):
        with LlamaCpp(model, threads=1) as runtime:
            runtime.logits(ids, 1, tmp_path / f"{name}.f32")
    names = ("adapted", "merged", "base")
    found = {name: np.fromfile(tmp_path / f"{name}.f32", np.float32) for name in names}
    off = np.abs(found["adapted"] - found["merged"]).mean()
    assert off < 0.03 * np.abs(found["base"] - found["merged"]).mean()


def test_keys(tmp_path: Path) -> None:
    *_, base, lora = exported(tmp_path)
    keys = read_header(lora.model).keys
    wanted = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "general.base_model.0.name": "Tiny-2M-Instruct",
        "edgedistill.recipe": "sql",
        "edgedistill.source_digest": "adapter-32",
        "edgedistill.lora_rank": 32,
    }
    assert {name: keys[name] for name in wanted} == wanted
    assert len(keys["edgedistill.base_sha256"]) == 64
    assert lora.model.name == "Tiny-2M-Instruct-sql-v1.0-F16-LoRA.gguf"
    assert base.name != lora.model.name


def test_rows_of_queries_are_reordered_as_the_base_is(tmp_path: Path) -> None:
    """The formula of llama.cpp's conversion/llama.py, LlamaModel.permute."""
    _, adapter, _, lora = exported(tmp_path, type="F32")
    b = load_file(adapter.folder / WEIGHTS)[f"{QUERY}.lora_B.weight"]
    stored = {tensor.name: tensor.data for tensor in GGUFReader(lora.model).tensors}
    heads = b.reshape(tiny.HEADS, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight.lora_b"], heads)


def test_a_rank_without_whole_blocks_stays_f16(tmp_path: Path) -> None:
    *_, lora = exported(tmp_path, type="Q8_0", rank=8)
    kinds = {tensor.name[-6:]: tensor.tensor_type for tensor in GGUFReader(lora.model).tensors}
    assert kinds == {"lora_a": GGMLQuantizationType.Q8_0, "lora_b": GGMLQuantizationType.F16}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
)
def test_what_an_adapter_file_cannot_say_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    adapter = made_adapter(student, tmp_path / "adapter")
    file = adapter.folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")
    base = base_file(student, tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        export_lora(adapter, student, base, "sql", tmp_path / "out", Silent())


def test_what_was_trained_whole_is_refused(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    base = base_file(student, tmp_path / "out")
    whole = Adapter(student.folder, "whole", 1)  # training leaves a checkpoint, see save_adapter
    with pytest.raises(ArtifactError, match="every weight was trained"):
        export_lora(whole, student, base, "sql", tmp_path / "out", Silent())


@pytest.mark.parametrize("odd", [1e5, np.nan])
def test_a_value_beyond_f16_is_named(tmp_path: Path, odd: float) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    adapter = made_adapter(student, tmp_path / "adapter")
    tensors = load_file(adapter.folder / WEIGHTS)
    tensors[f"{QUERY}.lora_A.weight"][3, 3] = odd
    save_file(tensors, adapter.folder / WEIGHTS)
    base = base_file(student, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"layers\.1\.self_attn\.q_proj"):
        export_lora(adapter, student, base, "sql", tmp_path / "out", Silent())


def test_another_architecture_is_refused_before_llama_cpp_is_asked(tmp_path: Path) -> None:
    *_, lora = exported(tmp_path)
    other = tiny.tiny_student(tmp_path / "other", architecture="qwen2")
    with pytest.raises(RuntimeFailure, match="for the architecture llama, the model is qwen2"):
        LlamaCpp(base_file(other, tmp_path / "q"), adapter=lora.model)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    _, adapter, base, _ = exported(tmp_path)
    tensors = load_file(adapter.folder / WEIGHTS)
    name = f"{QUERY}.lora_B.weight"
    save_file({**tensors, name: tensors[name][:128].copy()}, adapter.folder / WEIGHTS)
    student = Student(tmp_path / "student", "s", "example/Tiny-2M-Instruct", "MIT", "")
    smaller = Adapter(adapter.folder, "smaller", 1)
    with pytest.raises(RuntimeFailure, match=r"attn_q\.weight is \(256, 256\)") as refusal:
        export_lora(smaller, student, base, "sql", tmp_path / "out", Silent())
    assert "made for Tiny-2M-Instruct" in str(refusal.value.hint)


def test_what_llama_cpp_refuses_is_told(tmp_path: Path) -> None:
    """Our own check passes: alpha is no number that it looks at."""
    *_, base, lora = exported(tmp_path)
    data = lora.model.read_bytes()
    key = struct.pack("<Q", len("adapter.lora.alpha")) + b"adapter.lora.alpha"
    at = data.index(key) + len(key)
    assert data[at : at + 4] == struct.pack("<I", 6)
    lora.model.write_bytes(data[:at] + struct.pack("<I", 5) + data[at + 4 :])
    with pytest.raises(RuntimeFailure):
        LlamaCpp(base, adapter=lora.model)


def test_a_torn_adapter_is_refused(tmp_path: Path) -> None:
    *_, base, lora = exported(tmp_path)
    lora.model.write_bytes(lora.model.read_bytes()[:-5000])
    with pytest.raises(RuntimeFailure, match="ends behind the file"):
        LlamaCpp(base, adapter=lora.model)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    *_, base, _ = exported(tmp_path)
    with pytest.raises(RuntimeFailure, match=r"general\.type and adapter\.type are model and None"):
        LlamaCpp(base, adapter=base)
