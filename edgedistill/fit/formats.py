"""The exact arithmetic of each number format: what a weight is after quantize and dequantize.

`weight` is always what the runtime's quantizer reads: of an f16 file, the f16 values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgedistill.fit.block_formats import BLOCK_FORMATS, BlockFormat
from edgedistill.number_formats import FORMATS

CHUNK = 2**18  # weights at a time: the temporaries stay in a core's cache
CUDA_CHUNK = 2**26
CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantize_dequantize(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Float32 [rows, columns] after ggml_quantize_chunk and to_float of ggml type `name`, bit for
    bit (NaN, which llama.cpp refuses, apart). `importance` [columns] is llama.cpp's imatrix row.

    Raises:
        ValueError: no such format, or its block does not divide `columns` (see
            number_formats.usable).
    """
    _checked(weight, name)
    weight = weight.detach()
    if name in CASTS:
        return weight.to(CASTS[name]).to(torch.float32)
    if name in BLOCK_FORMATS and (importance is None or name == "Q8_0"):
        return _rounded(weight, BLOCK_FORMATS[name], FORMATS[name].block)
    raise NotImplementedError(f"{name} with a search")


def fake_quantize(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """`quantize_dequantize` whose gradient with respect to `weight` is the identity."""
    made: Tensor = _StraightThrough.apply(weight, quantize_dequantize, (name, importance))
    return made


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Not weight + (value - weight).detach(): float32 rounds that to another value."""

    @staticmethod
    def forward(context: Any, weight: Tensor, values: Any, given: tuple[Any, ...]) -> Tensor:
        made: Tensor = values(weight, *given)
        return made

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


def _rounded(weight: Tensor, number_format: BlockFormat, block: int) -> Tensor:
    blocks = weight.contiguous().view(-1, block)
    made = torch.empty_like(blocks)
    size = (CUDA_CHUNK if weight.is_cuda else CHUNK) // block
    for start in range(0, len(blocks), size):
        part = blocks[start : start + size]
        made[start : start + size] = number_format.values(part, number_format.steps(part))
    return made.view_as(weight)


def _checked(weight: Tensor, name: str) -> None:
    if name not in FORMATS:
        raise ValueError(f"there is no number format '{name}'; known: {', '.join(FORMATS)}")
    block, columns = FORMATS[name].block, weight.shape[-1]
    if columns % block:
        raise ValueError(f"{columns} columns do not divide into {name}'s blocks of {block}")
    if weight.dtype != torch.float32:
        raise ValueError(f"{name} is made of float32 weights, not of {weight.dtype}")
