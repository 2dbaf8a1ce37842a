"""The number formats a weight can be stored in: their blocks, bytes, and what llama.cpp puts in
their place when a row does not divide into blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ONNX_NAME = re.compile(r"int(4|8)-b(16|32|64|128)(-asym)?")
MIXED_NAME = re.compile(r"int(4|8)-b(16|32|64|128)")  # those that one model may mix


@dataclass(frozen=True)
class NumberFormat:
    """A ggml type: `block` weights of one row are stored in `bytes_per_block` bytes.

    `fallback` is what llama_model_quantize takes where `block` does not divide a row; None: F16.
    """

    name: str
    block: int
    bytes_per_block: int
    ggml_type: int
    fallback: str | None = None


@dataclass(frozen=True)
class MatMulNBits:
    """ONNX Runtime's MatMulNBits: `block` weights along the input dimension share a scale."""

    name: str
    bits: int
    block: int
    symmetric: bool


# Sizes and numbers: ggml-common.h and ggml.h; fallbacks: tensor_type_fallback, llama-quant.cpp.
FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        made.name: made
        for made in (
            NumberFormat("F32", 1, 4, 0),
            NumberFormat("F16", 1, 2, 1),
            NumberFormat("BF16", 1, 2, 30),
            NumberFormat("Q8_0", 32, 34, 8),
            NumberFormat("Q5_0", 32, 22, 6),
            NumberFormat("Q5_1", 32, 24, 7),
            NumberFormat("Q4_0", 32, 18, 2),
            NumberFormat("Q4_1", 32, 20, 3),
            NumberFormat("IQ4_NL", 32, 18, 20),
            NumberFormat("Q6_K", 256, 210, 14, "Q8_0"),
            NumberFormat("Q5_K", 256, 176, 13, "Q5_1"),
            NumberFormat("Q4_K", 256, 144, 12, "Q5_0"),
            NumberFormat("Q3_K", 256, 110, 11, "Q4_0"),
            NumberFormat("Q2_K", 256, 84, 10, "Q4_0"),
        )
    }
)


def usable(name: str, columns: int) -> str:
    """The type llama.cpp stores a matrix of `columns` inputs in when asked for `name`; an ONNX
    format takes any number of them.

    Raises:
        ValueError: no such format.
    """
    if ONNX_NAME.fullmatch(name):
        return name
    wanted = _ggml(name)
    if columns % wanted.block == 0:
        return name
    fallback = FORMATS[wanted.fallback or name]
    return fallback.name if columns % fallback.block == 0 else "F16"


def stored_bytes(rows: int, columns: int, name: str) -> int:
    """Bytes of a [rows, columns] matrix in a ggml type after its fallback, or in an ONNX format
    (codes, fp32 scales, and the zero points of an asymmetric one).

    Raises:
        ValueError: no such format.
    """
    if ONNX_NAME.fullmatch(name):
        return _onnx_bytes(rows, columns, onnx_format(name))
    stored = FORMATS[usable(name, columns)]
    return rows * (columns // stored.block) * stored.bytes_per_block


def onnx_format(name: str) -> MatMulNBits:
    """The format of a name such as "int4-b32" or "int8-b128-asym".

    Raises:
        ValueError: no such format.
    """
    found = ONNX_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"'{name}' is not an ONNX format such as int4-b32")
    return MatMulNBits(name, int(found[1]), int(found[2]), found[3] is None)


def _onnx_bytes(rows: int, columns: int, stored: MatMulNBits) -> int:
    blocks = -(-columns // stored.block)  # the last block of a row is filled up with zeros
    zero_points = 0 if stored.symmetric else -(-blocks * stored.bits // 8)
    return rows * (blocks * stored.block * stored.bits // 8 + blocks * 4 + zero_points)


def _ggml(name: str) -> NumberFormat:
    if name not in FORMATS:
        raise ValueError(f"there is no number format '{name}'; known: {', '.join(FORMATS)}")
    return FORMATS[name]
