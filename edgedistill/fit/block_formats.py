"""Q8_0, Q5_0, Q5_1, Q4_0, Q4_1 without an importance: one scale for 32 weights, no search.

The arithmetic of quantize_row_*_ref and dequantize_row_* in ggml-quants.c, step by step in
float32 with the same roundings: ggml-base is built without fused multiply-add on x86-64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
# Largest float32 below 1/2: trunc(x + this) is C's roundf for 0 <= x < 2^22, x + 1/2 is not.
BELOW_HALF = 0.49999997


class Steps(NamedTuple):
    """How groups of weights [n, group] are rounded: a tensor [n, 1] each."""

    inverse: Tensor | None  # code = rounded (weight - offset) * inverse; None: / scale
    scale: Tensor  # value = code * scale + minimum
    offset: Tensor | None = None
    minimum: Tensor | None = None


class BlockFormat(NamedTuple):
    """The two halves of a format: the steps of some blocks, and blocks rounded to such steps."""

    steps: Callable[[Tensor], Steps]
    values: Callable[[Tensor, Steps], Tensor]


def half(x: Tensor) -> Tensor:
    """As stored in float16 and read back."""
    return x.to(torch.float16).to(torch.float32)


def inverse(step: Tensor) -> Tensor:
    """1/step, and 0 for a step of 0."""
    return torch.where(step == 0, 0.0, step.reciprocal())


def nearest_int(x: Tensor) -> Tensor:
    """nearest_int of ggml-quants.c, as float32; `x` is used up. Half to even up to 2^22, beyond it
    the same wrong number as there: blocks that an importance calls worthless get that far."""
    bits = x.add_(12582912.0).view(torch.int32)
    return bits.bitwise_and_(0x7FFFFF).sub_(0x400000).to(torch.float32)


def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each block, without the much slower aminmax."""
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def extreme(x: Tensor) -> Tensor:
    """The weight of largest magnitude in each block, the first of several; [n, BLOCK] -> [n, 1]."""
    low, high = bounds(x)
    found = torch.where(high > -low, high, low)
    tie = (high == -low).squeeze(-1)
    if tie.any():
        blocks = x[tie]
        found[tie] = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    return found + 0.0  # of zeros, llama.cpp takes +0


def _symmetric(levels: int) -> BlockFormat:
    """Q4_0 (8 levels on each side) and Q5_0 (16): the extreme weight is code -levels."""

    def steps(x: Tensor) -> Steps:
        step = extreme(x) * (-1 / levels)  # a power of two: exact as the division is
        factor, scale = inverse(step), half(step)
        # A subnormal step: all codes become the conversion of infinity to int8, 0, that is -levels.
        too_small = factor.isinf()
        return Steps(torch.where(too_small, 0.0, factor), torch.where(too_small, -scale, scale))

    def values(x: Tensor, steps: Steps) -> Tensor:
        codes = (x * steps.inverse).add_(levels + 0.5).floor_().clamp_(0, 2 * levels - 1)
        return codes.sub_(levels).mul_(steps.scale)

    return BlockFormat(steps, values)


def _with_minimum(top: int) -> BlockFormat:
    """Q4_1 (codes to 15) and Q5_1 (to 31): the smallest weight is code 0."""

    def steps(x: Tensor) -> Steps:
        low, high = bounds(x)
        # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number.
        step = (high - low) / low.new_full((1,), top)
        factor = inverse(step)
        factor = torch.where(factor.isinf(), 0.0, factor)  # infinity becomes code 0 in C
        return Steps(factor, half(step), low, half(low))

    def values(x: Tensor, steps: Steps) -> Tensor:
        assert steps.offset is not None
        assert steps.minimum is not None
        codes = (x - steps.offset).mul_(steps.inverse).add_(0.5).floor_().clamp_(0, top)
        return codes.mul_(steps.scale).add_(steps.minimum)

    return BlockFormat(steps, values)


def _eight_bit() -> BlockFormat:
    """Q8_0: the largest magnitude is code 127."""

    def steps(x: Tensor) -> Steps:
        low, high = bounds(x)
        step = torch.maximum(high, -low).abs() / low.new_full((1,), 127.0)
        factor = inverse(step)
        too_small = factor.isinf()
        return Steps(torch.where(too_small, 0.0, factor), half(step))

    def values(x: Tensor, steps: Steps) -> Tensor:
        codes = x * steps.inverse
        codes = codes.add_(torch.copysign(codes.new_full((1,), BELOW_HALF), codes)).trunc_()
        # Plus zero: an integer has no sign there.
        return codes.clamp_(-127, 127).add_(0.0).mul_(steps.scale)

    return BlockFormat(steps, values)


BLOCK_FORMATS = {
    "Q8_0": _eight_bit(),
    "Q5_0": _symmetric(16),
    "Q4_0": _symmetric(8),
    "Q5_1": _with_minimum(31),
    "Q4_1": _with_minimum(15),
}
