"""What a model needs while it runs, by the runtime's formula in TRAITS (runtimes.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.runtimes import LLAMA, ONNX, WLLAMA, Runtime
from edgedistill.target import Target
from edgedistill.tensors import Layout

MICRO_BATCH = 512  # llama.cpp's default n_ubatch, for which a device's buffers are made
CACHE_BYTES = {LLAMA: 2, WLLAMA: 2, ONNX: 4}  # of one number in the KV cache
BUFFER_WIDTHS = 16  # of ONNX Runtime's activations for one token of a prompt, in model widths


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory at run time, and its parameter count."""

    layers: int
    kv_heads: int
    head_size: int
    width: int
    vocabulary: int
    parameters: int


def shape_of(runtime: Runtime) -> Shape:
    found = runtime.metadata()
    if "general.architecture" not in found:
        return _onnx_shape(found, runtime.facts)
    architecture = found["general.architecture"]

    def number(key: str, default: int = 0) -> int:
        return int(found.get(f"{architecture}.{key}", default))

    heads, width = number("attention.head_count"), number("embedding_length")
    return Shape(
        layers=number("block_count"),
        kv_heads=number("attention.head_count_kv", heads),
        head_size=number("attention.key_length", width // heads),
        width=width,
        vocabulary=runtime.facts["n_vocab"],
        parameters=runtime.facts["parameters"],
    )


def _onnx_shape(found: Mapping[str, str], facts: Mapping[str, Any]) -> Shape:
    def number(key: str) -> int:
        return int(found[f"model.decoder.{key}"])

    return Shape(
        layers=number("num_hidden_layers"),
        kv_heads=number("num_key_value_heads"),
        head_size=number("head_size"),
        width=number("hidden_size"),
        vocabulary=facts["n_vocab"],
        parameters=facts["parameters"],
    )


def shape_of_layout(layout: Layout) -> Shape:
    """The same of a checkpoint."""
    config = layout.config
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads,
        width=width,
        vocabulary=config["vocab_size"],
        parameters=layout.parameters,
    )


def memory_bytes(size: int, shape: Shape, target: Target) -> int:
    """What a model of `size` bytes needs while it runs, by the runtime's formula in TRAITS."""
    if target.runtime == ONNX:
        return onnx_memory(size, shape, target.context_tokens)
    return size + run_time_bytes(shape, target.context_tokens)


def largest_size(memory: int, shape: Shape, target: Target) -> int:
    """Bytes of the largest model that needs no more than `memory` bytes while it runs."""
    left = memory - memory_bytes(0, shape, target)
    return left // (memory_bytes(1, shape, target) - memory_bytes(0, shape, target))


def onnx_memory(files: int, shape: Shape, context_tokens: int) -> int:
    """What ONNX Runtime needs, in bytes. Weights are packed anew for the processor while the file
    is mapped; the cache is fp32, and made whole at the start."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * context_tokens * 4
    return 2 * files + cache + context_tokens * BUFFER_WIDTHS * shape.width * 4


def run_time_bytes(shape: Shape, context_tokens: int) -> int:
    """KV cache in f16 and llama.cpp's compute buffers, in bytes: its formula without the file.

    Both terms equal what llama.cpp itself reports for Llama and Qwen2. Where some layers look back
    over a window only (Gemma 3), the cache is smaller than this.
    """
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * context_tokens * 2
    buffers = min(MICRO_BATCH, context_tokens) * (shape.vocabulary + 2 * shape.width) * 4
    return cache + buffers
