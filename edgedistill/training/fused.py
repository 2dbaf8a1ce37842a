"""Fewer and larger kernels for a GPU, which waits for Python where rows are short.

Each computes what the layer computes that it stands for, up to rounding: a frozen linear map with
its LoRA update as one step of autograd, and RMSNorm as torch's one kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def fuse(model: Any) -> None:
    """Have the layers of a peft model compute so, where there is nothing in the way: a plain LoRA
    update (rsLoRA's is one) without dropout of an unquantized nn.Linear; an RMSNorm whose weights
    are frozen and not stored less one."""
    for module in model.modules():
        if _is_plain_lora(module):
            module.forward = functools.partial(_adapted, module, module.forward)
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_normed, module)


def _is_plain_lora(module: Any) -> bool:
    base = getattr(module, "base_layer", None)
    if type(base) is not torch.nn.Linear or not hasattr(module, "lora_variant"):
        return False
    single = len(module.lora_A) == 1 and not module.lora_variant
    dropped = any(type(each) is not torch.nn.Identity for each in module.lora_dropout.values())
    return single and not dropped and not any(module.lora_bias.values())


def _adapted(module: Any, usual: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """peft's forward of a LoRA layer, whose one adapter is active."""
    if rest or named or module.disable_adapters or module.merged:
        found: Tensor = usual(x, *rest, **named)
        return found
    (name,) = module.lora_A
    base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    made: Tensor = _Adapted.apply(x, base.weight, base.bias, down, up, module.scaling[name])
    return made


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """x W' + b + scale x A' B', of x [..., in], W [out, in], A [rank, in], B [out, rank], in W's
    precision; gradients of A and B are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        by: float,
    ) -> Tensor:
        kind = weight.dtype
        rows, down, up = x.reshape(-1, x.shape[-1]).to(kind), down.to(kind), up.to(kind)
        inner = rows @ down.T
        plain = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.by, ctx.given = by, x.dtype
        return plain.addmm_(inner, up.T, alpha=by).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = given[0].reshape(-1, given[0].shape[-1]).to(weight.dtype)
        within = (gradient @ up) * ctx.by
        of_x = None
        if ctx.needs_input_grad[0]:
            made = (gradient @ weight).addmm_(within, down)
            of_x = made.view(*given[0].shape[:-1], -1).to(ctx.given)
        of_up = _summed(gradient.T, inner).mul_(ctx.by)
        return of_x, None, None, _summed(within.T, rows), of_up, None


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Their product in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _normed(module: Any, x: Tensor) -> Tensor:
    weight = module.weight.to(x.dtype)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, module.variance_epsilon)
