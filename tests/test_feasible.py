from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgedistill.artifacts import Student
from edgedistill.errors import TargetError
from edgedistill.feasible import require_possible, scarce_memory
from edgedistill.target import Target
from edgedistill.tensors import read_layout

TARGET: dict[str, Any] = {
    "name": "small", "description": "a small device", "device_class": "board",
    "runtime": "llama.cpp", "formats": ["Q8_0"], "latency": "measured", "memory_budget_mb": 100,
}  # fmt: skip
MINE = {"name": "mine", "types": ["Q8_0"]}
FAST = {"name": "fast", "types": ["Q4_0", "Q8_0"]}
ROOFLINE = {"roofline": {"bandwidth_gb_s": 50, "efficiency": 0.5, "compute_gflops": 100}}
ONNX_MINE = {"name": "mine", "types": ["int4-b32"]}
ONNX = {"runtime": "onnxruntime-genai", "formats": ["int8-b32"]}


def changed(folder: Path, **config: object) -> Student:
    student = tiny.tiny_student(folder)
    found = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**found, **config}), "utf-8")
    return student


def sentencepiece(folder: Path) -> Student:
    student, file = tiny.tiny_student(folder), folder / "tokenizer.gguf.json"
    keys = json.loads(file.read_text("utf-8"))
    for key in keys:
        if key["key"] == "tokenizer.ggml.model":
            key["value"] = "llama"
    file.write_text(json.dumps(keys), "utf-8")
    return student


def test_what_is_possible_passes(tmp_path: Path) -> None:
    allocation = {**MINE, "vocabulary": 256, "drop_layers": 1}
    target = Target.model_validate({**TARGET, "allocations": [allocation]})
    require_possible(tiny.tiny_student(tmp_path), [target])


def test_layers_that_pruning_takes_count_too(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path)
    drops = Target.model_validate({**TARGET, "allocations": [{**MINE, "drop_layers": 1}]})
    require_possible(student, [drops])
    with pytest.raises(TargetError, match=r"mine behind student.prune \(1 layers\): drop_layers"):
        require_possible(student, [drops], pruned=1)
    tight = Target.model_validate({**TARGET, "allocations": [{**FAST, "budget_mb": 0.6}]})
    with pytest.raises(TargetError, match="budget_mb"):
        require_possible(student, [tight])
    require_possible(student, [tight], pruned=1)


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ({"allocations": [{**MINE, "drop_layers": 2}]}, {}, "drop_layers is 2.*drop at most 1"),
        (
            {"allocations": [{**MINE, "drop_layers": 1}]},
            {"layer_types": ["sliding_attention", "full_attention"]},
            "several kinds in a fixed order.*leave drop_layers out",
        ),
        ({"allocations": [MINE]}, {"architectures": ["OddForCausalLM"]}, "leave allocations out"),
        (
            {"formats": ["Q8_0", "Q4_0:imatrix"]},
            {"architectures": ["OddForCausalLM"]},
            "importance matrices are made of .* leave the formats with :imatrix out",
        ),
        (
            {**ONNX, "allocations": [{**ONNX_MINE, "embedding": "int8-b32"}]},
            {"tie_word_embeddings": False},
            "mine.embedding: this student's embedding is not its head",
        ),
        (
            {"allocations": [{"name": "mine", "types": ["Q4_0", "Q8_0"], "budget_mb": 0.1}]},
            {},
            r"mine.budget_mb: 0.1 is below the smallest that these types make, at least",
        ),
        (
            {"allocations": [{"name": "a", "types": ["Q4_0", "Q8_0"], "budget_memory_mb": 0.1}]},
            {},
            r"0.1: cache and buffers alone need more, and the file adds .* lower context_tokens",
        ),
        (
            {**ROOFLINE, "allocations": [{**FAST, "budget_tokens_per_second": 3e4}]},
            {},
            r"30000, a file of \S+ MB, is below the smallest .* lower it, or add smaller types",
        ),
        (
            {**ROOFLINE, "allocations": [{**FAST, "budget_tokens_per_second": 1e9}]},
            {},
            r"cache and buffers alone take longer to read, and the file adds .* lower it, or",
        ),
        (
            {"allocations": [{**MINE, "vocabulary": 10**6}]},
            {},
            r"small: allocations.mine: vocabulary is 1000000, .* nothing is trimmed",
        ),
        (ONNX, {"architectures": ["OddForCausalLM"]}, "OddForCausalLM cannot be exported to ONNX"),
    ],
)
def test_what_is_not_is_refused_at_the_start(
    tmp_path: Path, given: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    target = Target.model_validate({**TARGET, **given})
    with pytest.raises(TargetError, match=f"(?s){message}"):
        require_possible(changed(tmp_path, **config), [target])


def test_a_fitting_that_may_need_more_memory_is_told(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path)
    weights = read_layout(student.folder).parameters
    for method, each in (("full", 24), ("lora", 12)):
        fitted = {**MINE, "fit": {"method": method}}
        target = Target.model_validate({**TARGET, "allocations": [fitted]})
        assert list(scarce_memory(student, [target], weights * each)) == []
        assert list(scarce_memory(student, [target], None)) == []
        (told,) = scarce_memory(student, [target], weights * each - 1)
        assert told.startswith("small: fitting mine takes")
    plain = Target.model_validate({**TARGET, "allocations": [MINE]})
    assert list(scarce_memory(student, [plain], 0)) == []


def test_a_tokenizer_that_names_a_token_it_lacks_cannot_be_trimmed(tmp_path: Path) -> None:
    student, target = changed(tmp_path, eos_token_id=4000), {**MINE, "vocabulary": 256}
    with pytest.raises(TargetError, match=r"names token 4000(?s:.*)leave vocabulary out"):
        require_possible(student, [Target.model_validate({**TARGET, "allocations": [target]})])


def test_another_kind_of_vocabulary_cannot_be_trimmed(tmp_path: Path) -> None:
    target = Target.model_validate({**TARGET, "allocations": [{**MINE, "vocabulary": 256}]})
    with pytest.raises(TargetError, match="only a byte-level BPE vocabulary can be trimmed"):
        require_possible(sentencepiece(tmp_path), [target])
