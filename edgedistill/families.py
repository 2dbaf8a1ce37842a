"""The model families edgedistill trains and exports itself, and what sets each apart.

A checkpoint whose config asks for something that llama.cpp computes otherwise is refused by name:
the source of every rule here is llama.cpp's src/models/<architecture>.cpp and its converter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GEMMA_PATTERN = 6  # every sixth layer attends to everything
GEMMA_27B_LAYERS = 62  # llama.cpp knows its other attention scale by the number of layers
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """`source` is the class in a config's `architectures`, `architecture` llama.cpp's name.

    `permuted`: llama.cpp rotates neighbouring pairs of q and k rows, Hugging Face halves.
    `norm_offset` is added to every norm weight at conversion.
    """

    name: str
    source: str
    architecture: str
    rope_types: tuple[str, ...] = ("default", "linear")
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    rope_theta: float = 10000.0


FAMILIES = (
    Family("Llama and SmolLM2", "LlamaForCausalLM", "llama", ("default", "linear", "llama3"), True),
    Family("Mistral", "MistralForCausalLM", "llama", permuted=True),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2"),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "gemma3",
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        rope_theta=1e6,
    ),
    Family("Phi-3", "Phi3ForCausalLM", "phi3", ("default", "longrope")),
)
BY_SOURCE: Mapping[str, Family] = {family.source: family for family in FAMILIES}
ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES))


def known_names() -> str:
    """The families in words, for messages."""
    *names, last = (f"{family.name} ({family.source})" for family in FAMILIES)
    return f"{', '.join(names)} and {last}"


def is_own(checkpoint: Path) -> bool:
    """Whether a checkpoint folder is of one of these families."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return bool({*(config.get("architectures") or ())} & BY_SOURCE.keys())


def rope(config: Config, default_theta: float = 10000.0) -> Config:
    """RoPE parameters with `rope_theta` and `rope_type`, whichever way the config says it; those
    of full attention where layers differ."""
    own: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    own = own.get("full_attention", own)
    kind = own.get("rope_type", own.get("type", "default"))
    theta = own.get("rope_theta", config.get("rope_theta", default_theta))
    return {**own, "rope_type": kind, "rope_theta": theta}


def sliding_rope(config: Config) -> Config:
    """RoPE parameters of the sliding-window layers."""
    own = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    theta = own.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
    return {"rope_type": "default", **own, "rope_theta": theta}


def head_size(config: Config) -> int:
    """Values of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated(config: Config, own: Config) -> int:
    """How many values of a head are rotated; `own` are the RoPE parameters."""
    share = own.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


def original_context(config: Config, own: Config) -> int:
    """Context the base was first trained with, before its RoPE was stretched (Phi-3)."""
    found = own.get("original_max_position_embeddings")
    return int(found or config.get("original_max_position_embeddings") or _positions(config))


def even_context(config: Config) -> tuple[int, str | None]:
    """Tokens up to which a text is computed alike whatever is computed beside it or was before,
    and why no more.

    Beyond its first context longrope rotates all texts of a batch otherwise, and should rotate the
    keys in a cache anew. (genai does for some models, at 4097 tokens, one token late.)
    """
    tokens, own = _positions(config), rope(config)
    first = original_context(config, own)
    if own["rope_type"] == "longrope" and first < tokens:
        return first, "beyond that its RoPE (longrope) rotates the whole text otherwise"
    return tokens, None


def exact_context(family: Family, config: Config) -> tuple[int, str | None]:
    """Tokens up to which llama.cpp computes what the checkpoint computes, and why no more.

    llama.cpp's "llama" and "phi3" graphs have no sliding window, and it chooses between the short
    and the long factors of longrope by the context it was opened with, not by the prompt.
    """
    tokens = _positions(config)
    window = config.get("sliding_window")
    if window and window < tokens and family.source in ("MistralForCausalLM", "Phi3ForCausalLM"):
        tokens, why = int(window), "llama.cpp has no sliding window for this model"
    else:
        why = None
    own = rope(config)
    if own["rope_type"] == "longrope" and original_context(config, own) < tokens:
        tokens = original_context(config, own)
        why = "beyond that llama.cpp rotates short prompts like long ones"
    return tokens, why


def _positions(config: Config) -> int:
    return int(config["max_position_embeddings"])


def unsupported(family: Family, config: Config) -> Iterator[str]:
    """What this config asks for that llama.cpp computes otherwise."""
    kind = rope(config, family.rope_theta)["rope_type"]
    if kind not in family.rope_types:
        known = " and ".join(family.rope_types)
        yield f"RoPE type {kind} cannot be exported to GGUF yet, only {known}"
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        yield f"activation {activation} cannot be exported to GGUF, only {family.activation}"
    if family.architecture == "gemma3":
        yield from _unsupported_in_gemma(config)
    elif config.get("use_sliding_window") or "sliding_attention" in (
        config.get("layer_types") or ()
    ):
        yield "sliding-window attention cannot be exported to GGUF yet"


def _unsupported_in_gemma(config: Config) -> Iterator[str]:
    layers, scalar = config["num_hidden_layers"], config.get("query_pre_attn_scalar", 256)
    wanted = head_size(config)
    if layers == GEMMA_27B_LAYERS:
        wanted = config["hidden_size"] // config["num_attention_heads"]
    if scalar != wanted:
        yield f"query_pre_attn_scalar {scalar} cannot be exported to GGUF, only {wanted} here"
    types = config.get("layer_types")
    if types and list(types) != gemma_layer_types(layers):
        yield f"only one full-attention layer in {GEMMA_PATTERN} can be exported to GGUF"
    if sliding_rope(config)["rope_type"] != "default":
        yield "RoPE scaling of the sliding-window layers cannot be exported to GGUF"
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            yield f"{name} cannot be exported to GGUF"


def gemma_layer_types(layers: int) -> list[str]:
    """Which layers attend to a window only, as llama.cpp assumes it."""
    return [
        "sliding_attention" if (i + 1) % GEMMA_PATTERN else "full_attention" for i in range(layers)
    ]


def rope_factors(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that a GGUF holds beside the checkpoint's: by what each frequency is divided."""
    own = rope(config)
    if own["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(own, head_size(config))}
    if own["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(own[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    return {}


def _llama3_factors(own: Config, size: int) -> npt.NDArray[np.float32]:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (source:
    transformers' modeling_rope_utils.py, in float32 as llama.cpp's converter does)."""
    one = np.float32(1)
    base = np.float32(own.get("rope_theta", 10000.0))
    frequency = one / base ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    factor, low = np.float32(own.get("factor", 8.0)), own.get("low_freq_factor", 1.0)
    high, context = (
        own.get("high_freq_factor", 4.0),
        own.get("original_max_position_embeddings", 8192),
    )
    wave = np.float32(2 * math.pi) / frequency
    smooth = (np.float32(context) / wave - np.float32(low)) / np.float32(high - low)
    between = one / ((one - smooth) / factor + smooth)
    return np.where(wave < context / high, one, np.where(wave > context / low, factor, between))


def longrope_attention(config: Config) -> float:
    """By what longrope scales queries and keys (arXiv 2402.13753, as transformers computes it)."""
    own = rope(config)
    if own.get("attention_factor") is not None:
        return float(own["attention_factor"])
    context = original_context(config, own)
    scale = own.get("factor") or _positions(config) / context
    return math.sqrt(1 + math.log(scale) / math.log(context)) if scale > 1 else 1.0
