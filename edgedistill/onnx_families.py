"""Which checkpoints onnxruntime-genai's builder exports as torch computes them, and what it has to
be told so that it does.

Found by tests/test_onnx_families.py on tiny models in fp32, beyond every sliding window, prompts
and single tokens alike (onnxruntime-genai 0.18.0, onnxruntime 1.32.0, transformers 5.23.0): with
what `builder_config` says, all families of families.py come out with a mean KLD of 1e-12 nats (of
Gemma up to 1e-7, as its embedding's scale, a square root, is rounded to two decimals). Without it:

- Mistral and Phi-3: every layer of transformers' has the window, of the builder's none (mean KLD
  .02), since it asks `layer_types` which layers have one.
- Gemma 3: the builder knows one `rope_parameters`, not one for each kind of layer, and fails.
- Phi-3: the builder takes it for longrope where `original_max_position_embeddings` differs from
  `max_position_embeddings`, whatever the RoPE type, and fails; of longrope it wants `type`.
- Llama: linear RoPE scaling is left out (.6); the builder's Mistral, which is the same, has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgedistill.families import (
    BY_SOURCE,
    Config,
    Family,
    longrope_attention,
    original_context,
    rope,
    sliding_rope,
)

# A cache as short as the window is refused by the kernel where the context is shorter still.
WHOLE_CACHE = "windowed_kv_cache=false"


def builder_config(config: Config) -> dict[str, Any]:
    """What the builder is to see instead of a config.json of one of families.py."""
    family = BY_SOURCE[config["architectures"][0]]
    own, windowed = rope(config, family.rope_theta), bool(config.get("sliding_window"))
    seen: dict[str, Any] = {}
    if windowed and family.source in ("MistralForCausalLM", "Phi3ForCausalLM"):
        seen["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    if family.source == "LlamaForCausalLM" and own["rope_type"] == "linear":
        seen["architectures"] = ["MistralForCausalLM"]
    elif family.source == "Gemma3ForCausalLM":
        seen["rope_parameters"] = own
        seen["rope_theta"] = own["rope_theta"]
        seen["rope_local_base_freq"] = sliding_rope(config)["rope_theta"]
    elif family.source == "Phi3ForCausalLM" and own["rope_type"] == "default":
        seen["original_max_position_embeddings"] = config["max_position_embeddings"]
    elif family.source == "Phi3ForCausalLM":
        scale = longrope_attention(config)
        named = {"type": own["rope_type"], "short_mscale": scale, "long_mscale": scale}
        seen["rope_parameters"] = {**own, **named}
        seen["original_max_position_embeddings"] = original_context(config, own)
    return seen


def has_window(config: Config) -> bool:
    """Whether a layer may attend to a window only."""
    return bool(config.get("sliding_window"))


def unsupported_in_onnx(family: Family, config: Config) -> Iterator[str]:
    """What this config asks for that the builder computes otherwise, or cannot."""
    own = rope(config, family.rope_theta)
    kind, gemma = own["rope_type"], family.source == "Gemma3ForCausalLM"
    known = ("default",) if gemma else family.rope_types
    if kind not in known:  # of Gemma's linear scaling the window layers got a share (KLD .2)
        yield f"RoPE type {kind} cannot be exported to ONNX yet, only {' and '.join(known)}"
    if gemma and sliding_rope(config)["rope_type"] != "default":
        yield "RoPE scaling of the sliding-window layers cannot be exported to ONNX"
    share = own.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1.0 and family.source != "Phi3ForCausalLM":
        yield f"partial_rotary_factor {share} cannot be exported to ONNX, only Phi-3's"
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if gemma and config.get(name):
            yield f"{name} cannot be exported to ONNX"
