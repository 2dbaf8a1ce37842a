"""Which MatMul of an ONNX model computes with which matrix of a checkpoint.

The builder fuses query, key and value into one matrix, which has one format, and takes Phi-3's
fused gate and up apart. A tied embedding is the head's matrix; one of its own stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LAYER = re.compile(
    r"blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
)
NODES = {
    "attn_q": ("attn/qkv_proj",),
    "attn_k": ("attn/qkv_proj",),
    "attn_v": ("attn/qkv_proj",),
    "attn_qkv": ("attn/qkv_proj",),
    "attn_output": ("attn/o_proj",),
    "ffn_gate": ("mlp/gate_proj",),
    "ffn_up": ("mlp/up_proj",),
    "ffn_down": ("mlp/down_proj",),
}
GATE_AND_UP = ("mlp/gate_proj", "mlp/up_proj")  # as their rows follow each other
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
Config = Mapping[str, Any]


def nodes_of(name: str, config: Config) -> tuple[str, ...]:
    """The builder's nodes for a matrix by its GGUF name, in the order of its rows; none where it is
    not quantized there. `config` is the checkpoint's config.json."""
    if name == HEAD or (name == EMBEDDING and config.get("tie_word_embeddings")):
        return ("/lm_head/MatMul",)
    found = LAYER.fullmatch(name)
    if found is None:
        return ()
    fused = found[2] == "ffn_up" and config["architectures"][0] == "Phi3ForCausalLM"
    own = GATE_AND_UP if fused else NODES[found[2]]
    return tuple(f"/model/layers.{found[1]}/{node}/MatMul" for node in own)


def place_in_node(name: str) -> int:
    """Sorts the matrices of one node as their rows follow each other in it."""
    found = LAYER.fullmatch(name)
    return list(NODES).index(found[2]) if found else 0
