"""Which MatMul of an ONNX model computes with which matrix of a checkpoint.

The builder fuses query, key and value into one matrix, which has one format. A tied embedding is
the head's matrix; one of its own stays as it is.
"""

from __future__ import annotations

import re

LAYER = re.compile(
    r"blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight"
)
NODES = {
    "attn_q": "attn/qkv_proj",
    "attn_k": "attn/qkv_proj",
    "attn_v": "attn/qkv_proj",
    "attn_output": "attn/o_proj",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def node_of(name: str, tied: bool) -> str | None:
    """The builder's node for a matrix by its GGUF name; None: it is not quantized there. `tied`:
    the head is the embedding."""
    if name == HEAD or (tied and name == EMBEDDING):
        return "/lm_head/MatMul"
    found = LAYER.fullmatch(name)
    return f"/model/layers.{found[1]}/{NODES[found[2]]}/MatMul" if found else None


def place_in_node(name: str) -> int:
    """Sorts the matrices of one node as their rows follow each other in it."""
    found = LAYER.fullmatch(name)
    return list(NODES).index(found[2]) if found else 0
