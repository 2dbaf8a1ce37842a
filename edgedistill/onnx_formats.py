"""Names of the number formats of an ONNX model, and what they say.

    int4-b32               every matrix in 4 bits, a scale for each 32 weights (MatMulNBits)
    int4-b32-asym          a zero point beside each scale
    int4-b32-kquant        scale and zero point searched for, as llama.cpp's K types do
    int4-b32-int8head      the head (and a tied embedding, which is the same matrix) in 8 bits
    int4-b32-int8down      the head and every down projection in 8 bits
    int8-b32               every matrix in 8 bits

Blocks have 16, 32, 64 or 128 weights. Activations are rounded to 8 bits by the fast CPU kernels
(accuracy_level 4, the builder's choice for CPUs).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNQUANTIZED = "fp32"  # what an export is; no target ships it
GRAMMAR = "int4-b<16|32|64|128>[-asym|-kquant][-int8head|-int8down], int8-b<...>[-asym|-kquant]"
PATTERN = re.compile(
    r"int(?P<bits>[48])-b(?P<block>16|32|64|128)(?:-(?P<method>asym|kquant))?"
    r"(?:-int8(?P<wide>head|down))?"
)


@dataclass(frozen=True)
class OnnxFormat:
    """`bits` of most matrices, weights a block, how scales are found, what stays in 8 bits."""

    bits: Literal[4, 8]
    block: int
    method: Literal["", "asym", "kquant"] = ""
    wide: Literal["", "head", "down"] = ""


def parse_format(name: str) -> OnnxFormat | None:
    """The meaning of a quantized format's name; None where it has none."""
    found = PATTERN.fullmatch(name)
    if found is None or (found["bits"] == "8" and found["wide"]):
        return None
    return OnnxFormat(
        bits=8 if found["bits"] == "8" else 4,
        block=int(found["block"]),
        method="asym" if found["method"] == "asym" else "kquant" if found["method"] else "",
        wide="head" if found["wide"] == "head" else "down" if found["wide"] else "",
    )


def is_format(name: str) -> bool:
    """Whether a target may name it."""
    return parse_format(name) is not None
