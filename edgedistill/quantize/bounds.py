"""What a candidate may cost: size, memory at run time, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import GateFailed
from edgedistill.results import Candidate
from edgedistill.runtimes import ONNX, Runtime
from edgedistill.target import Target

CANDIDATES = "candidates.json"
MICRO_BATCH = 512  # llama.cpp's default n_ubatch, for which a device's buffers are made
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


def memory_bytes(size: int, shape: Shape, target: Target) -> int:
    """What a model of `size` bytes needs while it runs, by the runtime's formula in TRAITS."""
    if target.runtime == ONNX:
        return onnx_memory(size, shape, target.context_tokens)
    return size + run_time_bytes(shape, target.context_tokens)


def onnx_memory(files: int, shape: Shape, context_tokens: int) -> int:
    """What ONNX Runtime needs, in bytes. Weights are packed anew for the processor while the file
    is mapped; the cache is fp32, and made whole at the start."""
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * context_tokens * 4
    return 2 * files + cache + context_tokens * BUFFER_WIDTHS * shape.width * 4


def run_time_bytes(shape: Shape, context_tokens: int) -> int:
    """KV cache in f16 and llama.cpp's compute buffers, in bytes: its formula without the file.

    Both terms equal what llama.cpp itself reports for the two supported architectures.
    """
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * context_tokens * 2
    buffers = min(MICRO_BATCH, context_tokens) * (shape.vocabulary + 2 * shape.width) * 4
    return cache + buffers


@dataclass(frozen=True)
class Broken:
    """A bound that a candidate breaks; `factor` is how far, as measured over bound."""

    text: str
    factor: float


def broken_bounds(candidate: Candidate, target: Target) -> list[Broken]:
    """The target's bounds that the candidate is outside of."""
    gates = target.gates
    drop = round(candidate.agreement_before - candidate.agreement, 9)
    bounds: list[tuple[str, float, float | None, str]] = [
        ("file", candidate.bytes / 1e6, gates.max_file_mb, " MB"),
        ("memory", candidate.estimated_memory_bytes / 1e6, target.memory_budget_mb, " MB"),
        ("agreement drop", drop, gates.max_agreement_drop, ""),
    ]
    if candidate.fitted:  # it was trained to answer alike, not to predict alike
        rise = (candidate.nll or 0.0) - (candidate.nll_before or 0.0)
        bounds.append(("NLL rise", rise, gates.max_nll_rise, ""))
    else:
        bounds.append(("mean KLD", candidate.mean_kld, gates.max_mean_kld, ""))
        bounds.append(("p99 KLD", candidate.p99_kld, gates.max_p99_kld, ""))
    return [
        Broken(f"{name} {_shown(value)}{unit} > {_shown(bound)}{unit}", _factor(value, bound))
        for name, value, bound, unit in bounds
        if bound is not None and not value <= bound
    ]


def _shown(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _factor(value: float, bound: float) -> float:
    return value / bound if bound else 1 + value


def none_passes(table: Sequence[Candidate], target: Target, folder: Path) -> GateFailed:
    lines = [f"\n    {c.format}: {c.why_not}" for c in table]
    closest = min(table, key=lambda c: max(b.factor for b in broken_bounds(c, target)))
    return GateFailed(
        "quantize",
        f"no format is inside the bounds of target {target.name}:" + "".join(lines),
        where=str(folder),
        hint=f"closest is {closest.format}; loosen its bound, or add formats to the target "
        f"(all figures: {CANDIDATES} there)",
    )
