"""ONNX Runtime's MatMulNBits in int4 and int8: scales (and zero points) of blocks along the inputs.

The arithmetic of MlasQuantizeBlockwise (onnxruntime/core/mlas/lib/q4_dq.cpp), which
MatMulNBitsQuantizer's default configuration calls, with float32 scales; no search.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.fit.block_formats import BELOW_HALF, Steps, bounds, inverse
from edgedistill.number_formats import MatMulNBits


def steps(rows: Tensor, made: MatMulNBits) -> Steps:
    """The steps of each block of rows [n, columns]; `offset` is the zero point, a code."""
    x = _blocks(rows, made.block)
    low, high = bounds(x)
    if made.symmetric:
        middle = float(2 ** (made.bits - 1))
        scale = torch.where(high.abs() > low.abs(), high, low) * (-1 / middle)
        return Steps(inverse(scale), scale, torch.full_like(scale, middle))
    top = float(2**made.bits - 1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number.
    scale = (high - low) / low.new_full((1,), top)
    zero_point = torch.where(scale == 0, low, 0.0 - low / scale)
    zero_point = (zero_point + BELOW_HALF).floor_().clamp_(0, top)
    return Steps(inverse(scale), scale, zero_point)


def values(rows: Tensor, steps: Steps, made: MatMulNBits) -> Tensor:
    """Rows [n, columns] rounded to their blocks' steps."""
    assert steps.inverse is not None
    assert steps.offset is not None
    codes = _blocks(rows, made.block) * steps.inverse
    if steps.inverse.isinf().any():  # a subnormal step; 0 x infinity becomes code 0 in C
        codes.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    codes = codes.add_(steps.offset).add_(BELOW_HALF).floor_()
    codes.clamp_(0, 2**made.bits - 1).sub_(steps.offset).mul_(steps.scale)
    return codes.view(len(rows), -1)[:, : rows.shape[1]]


def _blocks(rows: Tensor, block: int) -> Tensor:
    """[n, columns] as [blocks, block]: a row is filled up with zeros, as the quantizer does."""
    missing = -rows.shape[1] % block
    return (functional.pad(rows, (0, missing)) if missing else rows).reshape(-1, block)
