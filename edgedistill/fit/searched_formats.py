"""IQ4_NL, and Q4_0, Q4_1, Q5_0, Q5_1 with an importance: llama.cpp searches the scale of a block.

quantize_row_*_impl, make_qx_quants, make_qkx3_quants and quantize_row_iq4_nl_impl of ggml-quants.c,
for all blocks at once. A sum over a block is taken in the same order, so it rounds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgedistill.fit.block_formats import BLOCK, Steps, extreme, half, inverse, nearest_int

SMALLEST = 1e-15  # GROUP_MAX_EPS: a block below it is stored as zeros
# kvalues_iq4nl of ggml-common.h.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class SearchedFormat(NamedTuple):
    """As BlockFormat, but the steps come of whole rows [n, columns] and an importance [columns]."""

    steps: Callable[[Tensor, Tensor | None], Steps]
    values: Callable[[Tensor, Steps], Tensor]


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the first dimension, one addend after the other as a C loop does."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def block_weights(rows: Tensor, importance: Tensor) -> Tensor:
    """importance * sqrt(mean square of the row + square): [n, columns] -> [blocks, BLOCK]."""
    squares = rows * rows
    mean = ordered_sum(squares.t()) / rows.new_full((1,), float(rows.shape[1]))
    return (_root(mean[:, None] + squares) * importance).view(-1, BLOCK)


def _root(x: Tensor) -> Tensor:
    """C's sqrtf. torch's own for float32 is MKL's on a CPU, which is a bit off now and then; the
    root in float64 rounds to the right float32."""
    return x.to(torch.float64).sqrt_().to(torch.float32)


def _float32(value: float) -> np.float32:
    return np.float32(value)


def _symmetric(levels: int) -> SearchedFormat:
    """Q4_0 and Q5_0: of 19 scales near the extreme weight's, that of least weighted error."""
    steps_beyond = [
        float(-(_float32(levels) + _float32(0.1) * _float32(i))) for i in range(-9, 10) if i
    ]

    def steps(rows: Tensor, importance: Tensor | None) -> Steps:
        assert importance is not None
        blocks = rows.reshape(-1, BLOCK)
        x, w = blocks.t().contiguous(), block_weights(rows, importance).t().contiguous()
        top = extreme(blocks).squeeze(-1)
        wx = w * x

        def attempt(numerator: float) -> tuple[Tensor, Tensor, Tensor]:
            factor = top.new_full((1,), numerator) / top
            codes = (x * factor).round_().clamp_(-levels, levels - 1)
            return factor, ordered_sum(wx * codes), ordered_sum((w * codes).mul_(codes))

        factor, sumlx, suml2 = attempt(float(-levels))
        scale = torch.where(suml2 == 0, 0.0, sumlx / suml2)
        best = scale * sumlx
        for numerator in steps_beyond:
            tried, sumlx, suml2 = attempt(numerator)
            better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
            scale = torch.where(better, sumlx / suml2, scale)
            best = torch.where(better, scale * sumlx, best)
            factor = torch.where(better, tried, factor)
        nothing = top.abs() < SMALLEST
        # Its codes are all -levels, which makes each value minus zero, as codes of 0 do of that.
        factor, scale = torch.where(nothing, 0.0, factor), torch.where(nothing, -0.0, scale)
        return Steps(factor[:, None], half(scale)[:, None])

    def values(x: Tensor, steps: Steps) -> Tensor:
        codes = (x * steps.inverse).round_().clamp_(-levels, levels - 1)
        # Plus zero: an integer has no sign there.
        return codes.add_(0.0).mul_(steps.scale)

    return SearchedFormat(steps, values)


class _Fit(NamedTuple):
    """The best scale and minimum so far, and what the codes that they belong to are made with."""

    error: Tensor
    inverse: Tensor
    offset: Tensor
    scale: Tensor
    minimum: Tensor


def _with_minimum(top: int) -> SearchedFormat:
    """Q4_1 and Q5_1: 37 scales tried; the codes of each give a least-squares scale and minimum."""
    numerators = [
        float(_float32(-0.9) + _float32(0.05) * _float32(i) + _float32(top)) for i in range(37)
    ]

    def steps(rows: Tensor, importance: Tensor | None) -> Steps:
        assert importance is not None
        x = rows.reshape(-1, BLOCK).t().contiguous()
        w = block_weights(rows, importance).t().contiguous()
        sums = (ordered_sum(w), ordered_sum(w * x))
        low, high = x.amin(0), x.amax(0)
        low = low.clamp(max=0.0)
        scale = (low.new_full((1,), float(top)) / (high - low)).reciprocal()
        factor = _over(float(top), high - low)
        codes = _codes(x, low, factor, top)
        fit = _Fit(_error(x, w, codes, scale, low), factor, low, scale, low)
        for numerator in numerators:
            fit = _better(fit, x, w, sums, high, numerator, top)
        flat = high <= low
        factor, scale = (torch.where(flat, 0.0, part) for part in (fit.inverse, fit.scale))
        offset, minimum = (torch.where(flat, low, part) for part in (fit.offset, fit.minimum))
        return Steps(factor[:, None], half(scale)[:, None], offset[:, None], half(minimum)[:, None])

    def values(x: Tensor, steps: Steps) -> Tensor:
        assert steps.offset is not None
        assert steps.minimum is not None
        codes = _codes(x, steps.offset, steps.inverse, top)
        return codes.mul_(steps.scale).add_(steps.minimum)

    return SearchedFormat(steps, values)


def _over(numerator: float, span: Tensor) -> Tensor:
    """numerator / span; where that is infinite 0, which makes the codes that C makes of it: 0."""
    factor = span.new_full((1,), numerator) / span
    return torch.where(factor.isinf(), 0.0, factor)


def _codes(x: Tensor, offset: Tensor, factor: Tensor, top: int) -> Tensor:
    return nearest_int((x - offset).mul_(factor)).clamp_(0, top)


def _error(x: Tensor, w: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    difference = (codes * scale).add_(minimum).sub_(x)
    return ordered_sum(difference.mul_(difference).mul_(w))


def _better(
    fit: _Fit,
    x: Tensor,
    w: Tensor,
    sums: tuple[Tensor, Tensor],
    high: Tensor,
    numerator: float,
    top: int,
) -> _Fit:
    """One attempt. llama.cpp counts from the minimum found so far, not from the block's own."""
    sum_w, sum_x = sums
    factor = _over(numerator, high - fit.minimum)
    codes = _codes(x, fit.minimum, factor, top)
    wl = w * codes
    sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * codes), ordered_sum(wl * x)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = minimum > 0
    scale = torch.where(positive, sum_xl / sum_l2, scale)
    minimum = torch.where(positive, 0.0, minimum)
    error = _error(x, w, codes, scale, minimum)
    better = (determinant > 0) & (error < fit.error)
    tried = _Fit(error, factor, fit.minimum, scale, minimum)
    return _Fit(*(torch.where(better, new, old) for new, old in zip(tried, fit, strict=True)))


def _nonlinear() -> SearchedFormat:
    """IQ4_NL: codes are indices of 16 fixed values; 15 scales tried around the extreme weight's."""
    reach = 256
    middles = [(a + b) / 2 for a, b in itertools.pairwise(IQ4_NL)]
    # The nearest value (of two, the upper) to a y with floor(2 y) = i: middles are halves.
    table = torch.tensor(
        [float(IQ4_NL[sum(i >= 2 * m for m in middles)]) for i in range(-reach, reach + 1)]
    )

    def nearest(y: Tensor) -> Tensor:
        index = y.mul_(2.0).floor_().nan_to_num_(0.0).clamp_(-reach, reach).add_(reach)
        return table.to(y.device)[index.to(torch.int64)]

    def steps(rows: Tensor, importance: Tensor | None) -> Steps:
        blocks = rows.reshape(-1, BLOCK)
        x = blocks.t().contiguous()
        w = x * x
        if importance is not None:
            mean = ordered_sum(w) * (2.0 / BLOCK)
            w = _root(mean + w) * importance.view(-1, BLOCK).t().repeat(1, len(rows))
        top = extreme(blocks).squeeze(-1)

        def attempt(factor: Tensor) -> tuple[Tensor, Tensor]:
            q = nearest(x * factor)
            wq = w * q
            return ordered_sum(wq * x), ordered_sum(wq.mul_(q))

        sumqx, sumq2 = attempt((-top / top.new_full((1,), float(IQ4_NL[0]))).reciprocal())
        scale = torch.where(sumq2 > 0, sumqx / sumq2, 0.0)
        best = scale * sumqx
        for i in range(-7, 8):
            sumqx, sumq2 = attempt(top.new_full((1,), float(i + IQ4_NL[0])) / top)
            better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
            scale = torch.where(better, sumqx / sumq2, scale)
            best = torch.where(better, scale * sumqx, best)
        scale = torch.where(top.abs() < SMALLEST, 0.0, scale)
        return Steps(inverse(scale)[:, None], half(scale)[:, None])

    def values(x: Tensor, steps: Steps) -> Tensor:
        return nearest(x * steps.inverse).mul_(steps.scale)

    return SearchedFormat(steps, values)


SEARCHED_FORMATS = {
    "Q5_0": _symmetric(16),
    "Q4_0": _symmetric(8),
    "Q5_1": _with_minimum(31),
    "Q4_1": _with_minimum(15),
    "IQ4_NL": _nonlinear(),
}
