from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer

from edgedistill.artifacts import Student
from edgedistill.errors import ArtifactError, MissingTool, RuntimeFailure
from edgedistill.fidelity import Kld, compare, record
from edgedistill.onnx_builder import (
    build_onnx,
    nodes_by_kind,
    option_words,
    spelled_out,
    wide_nodes,
)
from edgedistill.onnx_runtime import OnnxGenai
from edgedistill.torch_runtime import TorchModel

NODES = nodes_by_kind({"num_hidden_layers": 2})
UNTIED = {"architectures": ["LlamaForCausalLM"]}
TIED = {**UNTIED, "tie_word_embeddings": True}
PROMPT = "<|im_start|>user\nthe others in the canoe<|im_end|>\n"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny.tiny_student(tmp_path_factory.mktemp("student"))


def structured(words: list[str]) -> dict[str, Any]:
    given = json.loads(words[words.index("--target_options") + 1])
    return dict(given["quant_config"]["weights"])


def test_options_of_a_new_builder_name_matrices() -> None:
    weights = structured(option_words("int4-b32-int8down", "0.18.0", NODES, tied=True))
    named = [item["match"]["name"] for item in weights["overrides"]]
    down = [f"/model/layers.{i}/mlp/down_proj/MatMul" for i in (0, 1)]
    assert named == ["/lm_head/MatMul", *down]
    assert (weights["type"], weights["block_size"], weights["method"]) == ("int4", 32, "default")
    every = structured(option_words("int8-b64", "0.18.1", NODES, tied=False))
    assert len(every["overrides"]) == 2 * 5 + 1
    assert every["op_types"] == ["MatMul"]


@pytest.mark.parametrize(
    ("version", "format", "words"),
    [
        ("0.17.2", "int4-b32-int8head",
         ["block_size=32", "matmul_mixed_precision=last_matmul:int8", "algo_config=default"]),
        ("0.15.0", "int4-b64-asym", ["block_size=64", "is_symmetric=false", "algo_config=rtn"]),
        ("0.14.1", "int4-b32", ["int4_block_size=32", "int4_algo_config=default"]),
        ("0.14.1", "int4-b32-kquant-int8head",
         ["int4_block_size=32", "int4_algo_config=k_quant_last"]),
    ],
)  # fmt: skip
def test_options_of_older_builders(version: str, format: str, words: list[str]) -> None:
    found = option_words(format, version, NODES, tied=True)
    assert found == ["-p", "int4", "--extra_options", "prune_lm_head=true", *words]


@pytest.mark.parametrize(
    ("version", "format"),
    [("0.17.2", "int8-b32"), ("0.16.0", "int4-b32-int8down"), ("0.13.0", "int4-b32")],
)
def test_what_an_older_builder_cannot_make(version: str, format: str) -> None:
    with pytest.raises(MissingTool, match=f"{version} cannot make {format}"):
        option_words(format, version, NODES, tied=True)


def test_an_allocation_names_the_nodes_in_8_bits() -> None:
    types = {f"blk.0.attn_{part}.weight": "int8-b32" for part in "qkv"}
    types |= {"blk.0.ffn_down.weight": "int4-b32", "token_embd.weight": "int8-b32"}
    assert wide_nodes(types, UNTIED) == ["/model/layers.0/attn/qkv_proj/MatMul"]
    named = wide_nodes(types, TIED)
    assert named == ["/model/layers.0/attn/qkv_proj/MatMul", "/lm_head/MatMul"]
    weights = structured(option_words("int4-b32", "0.18.0", NODES, tied=True, wide=named))
    assert [item["match"]["name"] for item in weights["overrides"]] == named
    with pytest.raises(ValueError, match="holds matrices of int8-b32 and of int4-b32"):
        wide_nodes({**types, "blk.0.attn_k.weight": "int4-b32"}, TIED)
    with pytest.raises(MissingTool, match=r"0.17.0 cannot make int4-b32"):
        option_words("int4-b32", "0.17.0", NODES, tied=True, wide=named)


def test_white_space_is_spelled_out_without_changing_a_token(student: Student) -> None:
    text = (student.folder / "tokenizer.json").read_text("utf-8")
    changed = json.dumps(spelled_out(json.loads(text)))
    before, after = Tokenizer.from_str(text), Tokenizer.from_str(changed)
    ending = json.dumps(r"|\s+")[1:]
    assert (text.count(ending), changed.count(ending)) == (0, 1)
    for sample in (PROMPT, "\t\tthe\n\n  x", " \r\n\ta \u3000b", "12 34"):
        assert before.encode(sample).ids == after.encode(sample).ids


def test_an_architecture_that_cannot_be_exported(student: Student, tmp_path: Path) -> None:
    config = json.loads((student.folder / "config.json").read_text("utf-8"))
    odd = json.dumps({**config, "architectures": ["OddForCausalLM"]})
    (tmp_path / "config.json").write_text(odd, "utf-8")
    with pytest.raises(ArtifactError, match="OddForCausalLM cannot be exported to ONNX yet"):
        build_onnx(tmp_path, tmp_path / "made", "fp32")
    assert not (tmp_path / "made").exists()


def test_what_the_builder_refuses_leaves_nothing(student: Student, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in student.folder.iterdir():
        kept = file.read_bytes()
        (torn / file.name).write_bytes(kept[:100] if file.suffix == ".safetensors" else kept)
    with pytest.raises(RuntimeFailure, match="build: "):
        build_onnx(torn, tmp_path / "made", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["torn"]


def measured(student: Student, model: Path, scratch: Path) -> tuple[Kld, dict[str, Any]]:
    """KLD of the checkpoint in torch to the model folder, on tokens of its own."""
    with OnnxGenai(model, threads=1, context_tokens=128) as runtime:
        asked = runtime.tokenize(PROMPT)
        made = [*runtime.generate(asked, 20, frozenset()).ids]
        runtime.logits(asked + made, len(asked), scratch / "after")
        facts = dict(runtime.facts)
    record(TorchModel(student.folder).logits([(asked + made, len(asked))]), scratch / "before")
    return compare(scratch / "before", scratch / "after", facts["n_vocab"]), facts


@pytest.mark.parametrize(
    ("format", "low", "high"),
    [
        ("int4-b32", 0.05, 3.0),
        ("int4-b32-asym-int8down", 0.02, 1.5),
        ("int4-b32-int8head", 0.02, 1.5),
        ("int8-b32", 1e-5, 0.03),
    ],
)
def test_formats(student: Student, tmp_path: Path, format: str, low: float, high: float) -> None:
    model = tmp_path / "made"
    build_onnx(student.folder, model, format, context_tokens=128, threads=1)
    kld, facts = measured(student, model, tmp_path)
    assert low < kld.mean_kld < high
    assert facts["parameters"] == 1_250_560
    bits = 8 * facts["size"] / facts["parameters"]
    assert (4.5 if format.startswith("int4") else 8.5) < bits < 11  # the graph is half of a bit
    config = json.loads((model / "genai_config.json").read_text("utf-8"))
    assert (config["search"]["max_length"], config["search"]["do_sample"]) == (128, False)
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 1


def test_the_same_checkpoint_gives_the_same_bytes(student: Student, tmp_path: Path) -> None:
    for name in ("first", "second"):
        build_onnx(student.folder, tmp_path / name, "int4-b32-int8head")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
