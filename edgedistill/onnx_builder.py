"""The boundary to onnxruntime-genai's model builder: a checkpoint folder becomes an ONNX model
folder. It runs in a child process (onnx_builder_child.py), since it holds the model several times
over and prints what it likes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import write_json
from edgedistill.child import Child, Program
from edgedistill.errors import ArtifactError, MissingTool, RuntimeFailure
from edgedistill.families import BY_SOURCE, even_context, known_names
from edgedistill.onnx_families import (
    WHOLE_CACHE,
    builder_config,
    has_window,
    unsupported_in_onnx,
)
from edgedistill.onnx_formats import UNQUANTIZED, OnnxFormat, parse_format
from edgedistill.onnx_nodes import nodes_of
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec

BUILDER = Program(
    runtime="onnxruntime-genai's model builder",
    module="edgedistill.onnx_builder_child",
    packages={
        "onnxruntime_genai": "onnxruntime-genai",
        "onnxruntime": "onnxruntime",
        "onnx_ir": "onnx-ir",
        "onnx": "onnx",
        "transformers": "transformers",
        "torch": "torch",
    },
    extra="onnx",
)
PACKAGE = "onnxruntime-genai"
BUILD_SECONDS = 2 * 3600.0
CONFIG, TEMPLATE, MODEL = "genai_config.json", "chat_template.jinja", "model.onnx"
LAST_LOGITS = "prune_lm_head=true"
# As this class genai cuts SentencePiece's BPE as it is meant, as any other it takes several spaces
# apart and puts none in front of a text.
SENTENCEPIECE = "GemmaTokenizer"
WHITESPACE = (r"\s+(?!\S)", r"\s+(?!\S)|\s+")


def build_onnx(
    checkpoint: Path,
    destination: Path,
    format: str,
    *,
    context_tokens: int | None = None,
    threads: int | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Write the model folder `destination`; it appears only when complete.

    `types` (GGUF name -> "int4-b<n>" or "int8-b<n>", as an allocation has them) goes before
    `format` for those matrices, and has its block. The folder's genai_config.json asks for greedy
    decoding in `context_tokens` (none: families.even_context), for which an app's KV cache
    is made, and for `threads` where given (else the device decides).

    Raises:
        ArtifactError: an architecture, or what of it, that cannot be exported.
        MissingTool: the builder is not installed, or is too old for this format.
        RuntimeFailure: the builder refused or died.
    """
    refuse_unknown(checkpoint)
    version = _version()
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        tied = _is_tied(config)
        wide = wide_nodes(types, config) if types else None
        words = option_words(format, version, nodes_by_kind(config), tied, wide)
        if has_window(config):
            words.insert(words.index(LAST_LOGITS), WHOLE_CACHE)
        _run(words, parse_format(format), checkpoint, temporary)
        made = temporary / "made"
        write_onnx_tokenizer(checkpoint, made)
        stop = StudentPrompt(checkpoint, StudentSpec(weights=checkpoint.name)).stop_ids
        _own_config(made / CONFIG, even_context(config)[0], stop, context_tokens, threads)
        if destination.exists():
            shutil.rmtree(destination)
        os.replace(made, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_unknown(checkpoint: Path) -> None:
    """Raise for a checkpoint that is not known to come through the builder unharmed.

    Raises:
        ArtifactError: names the architecture, or what of it.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    found = (config.get("architectures") or [None])[0]
    if found not in BY_SOURCE:
        what = f"architecture {found} cannot be exported to ONNX yet, only {known_names()}"
    else:
        what = next(unsupported_in_onnx(BY_SOURCE[found], config), "")
    if what:
        raise ArtifactError(
            what,
            where=str(checkpoint),
            hint="choose another student.weights, or a target that runs llama.cpp",
        )


def option_words(
    format: str,
    version: str,
    nodes: Mapping[str, Sequence[str]],
    tied: bool,
    wide: Sequence[str] | None = None,
) -> list[str]:
    """The builder's command line for a format, by its version; `nodes` as `nodes_by_kind` gives it,
    `tied` where the head is the embedding, `wide` the nodes in 8 bits where they are named.

    Until 0.14 the options begin with "int4_" and there is no int8; since 0.15 those names are
    deprecated; matrices can be named one by one since 0.18. In all of them the head computes the
    logits of a prompt's last token only: for a small model the others are a fifth of its work.

    Raises:
        MissingTool: that version cannot make the format.
    """
    number = tuple(int(part) for part in version.split(".")[:2])
    asked = parse_format(format)
    if asked is None and format != UNQUANTIZED:
        raise ValueError(f"no ONNX format {format}")
    if number < (0, 14):
        raise _too_old(format, version)
    if asked is None:
        return ["-p", "fp32", "--extra_options", LAST_LOGITS]
    if number >= (0, 18):
        return _structured(asked, nodes, tied, wide)
    if asked.bits == 8 or asked.wide == "down" or wide is not None:
        raise _too_old(format, version)
    return _flat(asked, "" if number >= (0, 15) else "int4_", number >= (0, 15))


def wide_nodes(types: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Nodes whose matrices an allocation (GGUF name -> type) puts into 8 bits; `config` is the
    checkpoint's.

    Raises:
        ValueError: one node would need two types.
    """
    found: dict[str, str] = {}
    for name, kind in types.items():
        for node in nodes_of(name, config):
            if found.setdefault(node, kind) != kind:
                raise ValueError(f"{node} holds matrices of {found[node]} and of {kind}")
    return [node for node, kind in found.items() if kind.startswith("int8")]


def _structured(
    asked: OnnxFormat,
    nodes: Mapping[str, Sequence[str]],
    tied: bool,
    given: Sequence[str] | None,
) -> list[str]:
    # Always "int4" with 8 bits by name: with precision int8 the builder leaves a tied embedding in
    # fp32 beside its head, which for a small model is half of the file.
    wide = {"": [], "head": ["head"], "down": ["head", "down"]}[asked.wide]
    named = [name for kind in (list(nodes) if asked.bits == 8 else wide) for name in nodes[kind]]
    if given is not None:
        named = list(given)
    weights: dict[str, Any] = {
        "type": "uint4" if asked.method == "asym" else "int4",
        "block_size": asked.block,
        "method": {"": "default", "asym": "rtn", "kquant": "k_quant"}[asked.method],
        # Without Gather a tied embedding is written once more, in fp32.
        "op_types": ["MatMul", "Gather"] if tied else ["MatMul"],
        "overrides": [{"match": {"name": name}, "type": "int8"} for name in named],
    }
    target = json.dumps({"quant_config": {"weights": weights}})
    return ["-p", "int4", "--extra_options", LAST_LOGITS, "--target_options", target]


def _flat(asked: OnnxFormat, prefix: str, mixes: bool) -> list[str]:
    method = {"": "default", "asym": "rtn", "kquant": "k_quant"}[asked.method]
    words = [LAST_LOGITS, f"{prefix}block_size={asked.block}"]
    if asked.method == "asym":
        words.append(f"{prefix}is_symmetric=false")
    if asked.wide and mixes:
        words.append("matmul_mixed_precision=last_matmul:int8")
    elif asked.wide:
        method = {"default": "rtn_last", "rtn": "rtn_last", "k_quant": "k_quant_last"}[method]
    words.append(f"{prefix}algo_config={method}")
    return ["-p", "int4", "--extra_options", *words]


def _too_old(format: str, version: str) -> MissingTool:
    return MissingTool(
        f"{PACKAGE} {version} cannot make {format}",
        hint=f'pip install -U "{PACKAGE}>=0.18"',
    )


def nodes_by_kind(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the builder's MatMul nodes by kind: attention, up (with gate), down, head.

    It fuses query, key and value into one matrix, and gate and up are two, in all families.
    """
    layers = [f"/model/layers.{i}" for i in range(config["num_hidden_layers"])]
    return {
        "attention": [f"{at}/attn/{n}/MatMul" for at in layers for n in ("qkv_proj", "o_proj")],
        "up": [f"{at}/mlp/{n}/MatMul" for at in layers for n in ("gate_proj", "up_proj")],
        "down": [f"{at}/mlp/down_proj/MatMul" for at in layers],
        "head": ["/lm_head/MatMul"],
    }


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingTool(
            f"the package {PACKAGE} is not installed",
            hint='in the checkout: pip install -e ".[onnx]"',
        ) from error


def _run(words: Sequence[str], asked: OnnxFormat | None, checkpoint: Path, scratch: Path) -> None:
    child = Child(BUILDER, checkpoint, BUILD_SECONDS)
    places = ["-i", str(checkpoint), "-o", str(scratch / "made"), "-c", str(scratch / "cache")]
    try:
        given = [*words, "-m", "none", "-e", "cpu", *places]
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        child.ask("build", words=given, seen=builder_config(config))
        file = scratch / "made" / MODEL
        if not file.is_file():
            raise RuntimeFailure(f"{BUILDER.runtime} wrote no {MODEL}", where=str(checkpoint))
        if asked is not None:
            child.ask("reconnect_embedding", file=str(file), block=asked.block)
    finally:
        child.close()


def write_onnx_tokenizer(checkpoint: Path, made: Path) -> None:
    """The tokenizer that training used, in place of what a save by transformers made of it."""
    (made / TOKENIZER).write_bytes(own_tokenizer(checkpoint))
    config = json.loads((checkpoint / TOKENIZER_CONFIG).read_text("utf-8"))
    (made / TEMPLATE).write_bytes(config["chat_template"].encode())
    shutil.copyfile(checkpoint / TOKENIZER_CONFIG, made / TOKENIZER_CONFIG)
    tokenizer = json.loads((checkpoint / TOKENIZER).read_text("utf-8"))
    if tokenizer["model"].get("byte_fallback"):
        write_json(made / TOKENIZER_CONFIG, {**config, "tokenizer_class": SENTENCEPIECE})


def own_tokenizer(checkpoint: Path) -> bytes:
    """The tokenizer.json of a checkpoint as its ONNX model has it."""
    tokenizer = json.loads((checkpoint / TOKENIZER).read_text("utf-8"))
    return json.dumps(spelled_out(tokenizer), ensure_ascii=False).encode()


def spelled_out(tokenizer: dict[str, Any]) -> dict[str, Any]:
    r"""A tokenizer.json in which single white space matches a rule of its own.

    GPT-2's expression as llama.cpp has it ends with `\s+(?!\S)`, so the last white space before a
    word matches nothing and stays a piece all the same. genai's splitter loses its place there: it
    gives other IDs for mixed tabs and line ends, and fails on some texts.
    """
    for part in (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", []):
        pattern = part.get("pattern", {})
        if pattern.get("Regex", "").endswith(WHITESPACE[0]):
            pattern["Regex"] = pattern["Regex"].removesuffix(WHITESPACE[0]) + WHITESPACE[1]
    return tokenizer


def _own_config(
    file: Path,
    longest: int,
    stop_ids: frozenset[int],
    context_tokens: int | None,
    threads: int | None,
) -> None:
    config = json.loads(file.read_text("utf-8"))
    config["model"]["context_length"] = longest
    known = config["model"]["eos_token_id"]
    if not stop_ids <= {*(known if isinstance(known, list) else [known])}:
        # The builder knows the end of a text, not what the chat template ends a turn with.
        config["model"]["eos_token_id"] = sorted(stop_ids)
    # The builder's max_length is the model's limit; an app's cache has this size from the start.
    config["search"] |= {
        "max_length": min(context_tokens or longest, longest),
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
    if threads is not None:
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_bytes((json.dumps(config, indent=4) + "\n").encode())
