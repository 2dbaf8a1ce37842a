"""Q6_K, Q5_K, Q4_K, Q3_K, Q2_K: the scales that the library has found, and rounding to them.

The layout of a block of 256 is that of block_q*_K in ggml-common.h; the rounding is the last pass
of quantize_row_q*_K, and dequantize_row_q*_K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from edgedistill.fit.block_formats import Steps, nearest_int


class KFormat(NamedTuple):
    """`group` weights share a scale; codes run from `low` to `high`; `read` takes the scales (and
    minimums) [blocks, 256 / group] of stored blocks [blocks, bytes]."""

    group: int
    low: int
    high: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def steps(self, blocks: Tensor) -> Steps:
        scale, minimum = self.read(blocks)
        return Steps(
            None, scale.reshape(-1, 1), None, None if minimum is None else minimum.reshape(-1, 1)
        )

    def values(self, x: Tensor, steps: Steps) -> Tensor:
        # llama.cpp keeps other codes where the scale is 0; their value is the same.
        divisor = torch.where(steps.scale == 0, 1.0, steps.scale)
        if steps.minimum is None:
            codes = nearest_int(x / divisor).clamp_(self.low, self.high)
            return codes.mul_(steps.scale)
        codes = nearest_int((x - steps.minimum).div_(divisor)).clamp_(self.low, self.high)
        return codes.mul_(steps.scale).add_(steps.minimum)


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _q6(blocks: Tensor) -> tuple[Tensor, None]:
    return _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


def _q3(blocks: Tensor) -> tuple[Tensor, None]:
    """Sixteen scales of 6 bits: low halves in 8 bytes, high pairs in 4."""
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    codes = (low | (high << 4)).to(torch.float32) - 32
    return _float16(blocks, 108) * codes, None


def _q2(blocks: Tensor) -> tuple[Tensor, Tensor]:
    packed = blocks[:, :16]
    return _float16(blocks, 80) * (packed & 15), -(_float16(blocks, 82) * (packed >> 4))


def _q45(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of 6 bits in 12 bytes, as get_scale_min_k4 reads them."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return _float16(blocks, 0) * scales, -(_float16(blocks, 2) * minimums)


K_FORMATS = {
    "Q6_K": KFormat(16, -32, 31, _q6),
    "Q5_K": KFormat(32, 0, 31, _q45),
    "Q4_K": KFormat(32, 0, 15, _q45),
    "Q3_K": KFormat(16, -4, 3, _q3),
    "Q2_K": KFormat(16, 0, 3, _q2),
}
