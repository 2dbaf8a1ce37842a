"""The GGUF keys that tell llama.cpp how to compute a checkpoint, without its architecture prefix.

Keys and values are those of llama.cpp's converter (its conversion folder), but for the context
length where llama.cpp computes a longer one otherwise (see families.exact_context).
"""

from __future__ import annotations

from collections.abc import Mapping

from edgedistill.families import (
    exact_context,
    head_size,
    longrope_attention,
    original_context,
    rotated,
    sliding_rope,
)
from edgedistill.tensors import Layout

Value = int | float | str


def hyperparameters(layout: Layout) -> dict[str, Value]:
    """GGUF keys (such as "attention.head_count") and values: int for u32, float for f32."""
    config, heads = layout.config, layout.config["num_attention_heads"]
    keys: dict[str, Value] = {
        "block_count": config["num_hidden_layers"],
        "context_length": exact_context(layout.family, config)[0],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "rope.freq_base": float(layout.rope["rope_theta"]),
    }
    architecture = layout.architecture
    if architecture in ("llama", "qwen2"):
        keys["rope.dimension_count"] = head_size(config)
    if layout.rope["rope_type"] == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = float(layout.rope["factor"])
    if architecture == "phi3":
        keys |= _phi3(layout)
    elif config.get("head_dim") is not None or architecture == "gemma3":
        keys["attention.key_length"] = head_size(config)
        keys["attention.value_length"] = head_size(config)
    keys["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if architecture in ("llama", "qwen2"):
        keys["vocab_size"] = config["vocab_size"]
    if architecture == "gemma3":
        keys |= _gemma3(config)
    return keys


def _gemma3(config: Mapping[str, int | float]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.freq_base_swa": float(sliding_rope(config)["rope_theta"]),
        "attention.sliding_window": config["sliding_window"],
    }
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return keys


def _phi3(layout: Layout) -> dict[str, Value]:
    config = layout.config
    keys: dict[str, Value] = {
        "rope.scaling.original_context_length": original_context(config, layout.rope),
        "rope.dimension_count": rotated(config, layout.rope),
        # 0 tells llama.cpp that there is none; with another value it warns and goes on without.
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if layout.rope["rope_type"] == "longrope":
        keys["rope.scaling.attn_factor"] = longrope_attention(config)
    return keys
