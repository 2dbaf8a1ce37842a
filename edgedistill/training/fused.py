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
    """Have the layers of a model compute so, where there is nothing in the way: a plain LoRA update
    (rsLoRA's is one) without dropout of an unquantized nn.Linear; an RMSNorm whose weights are not
    stored less one."""
    for module in model.modules():
        theirs: Any = type(module)
        if _is_plain_lora(module):
            module.__class__ = _with(_FusedLora, theirs)
        elif theirs.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.__class__ = _with(_FusedNorm, theirs)


@functools.cache
def _with(ours: Any, theirs: Any) -> Any:
    """A class, not a function in the module's `forward`: that would hold the module, and its
    weights would wait for the garbage collector."""
    return theirs if issubclass(theirs, ours) else type(theirs.__name__, (ours, theirs), {})


def is_fused(module: Any) -> bool:
    """Whether a layer computes as this module says."""
    return isinstance(module, _FusedLora | _FusedNorm)


def _is_plain_lora(module: Any) -> bool:
    base = getattr(module, "base_layer", None)
    if type(base) is not torch.nn.Linear or not hasattr(module, "lora_variant"):
        return False
    single = len(module.lora_A) == 1 and not module.lora_variant
    dropped = any(type(each) is not torch.nn.Identity for each in module.lora_dropout.values())
    return single and not dropped and not any(module.lora_bias.values())


class _FusedLora(torch.nn.Module):  # type: ignore[misc]
    """peft's LoRA layer with one adapter."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if rest or named or self.disable_adapters or self.merged:
            found: Tensor = super().forward(x, *rest, **named)
            return found
        (name,) = self.lora_A
        base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        made: Tensor = _Adapted.apply(x, base.weight, base.bias, down, up, self.scaling[name])
        return made


class _FusedNorm(torch.nn.Module):  # type: ignore[misc]
    """RMSNorm in the precision of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # torch 2.12's would make fp32 of it
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """x W' + b + scaling x A' B', of x [..., in], W [out, in], A [rank, in], B [out, rank], in
    autocast's precision, or W's; gradients of A and B are fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        where = x.device.type
        autocast = torch.is_autocast_enabled(where)
        dtype = torch.get_autocast_dtype(where) if autocast else weight.dtype
        weight, down, up = weight.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        inner = rows @ down.T
        plain = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling, ctx.dtype = scaling, x.dtype
        return plain.addmm_(inner, up.T, alpha=scaling).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = given[0].reshape(-1, given[0].shape[-1]).to(weight.dtype)
        within = (gradient @ up) * ctx.scaling
        of_x = None
        if ctx.needs_input_grad[0]:
            made = (gradient @ weight).addmm_(within, down)
            of_x = made.view(*given[0].shape[:-1], -1).to(ctx.dtype)
        of_up = _summed(gradient.T, inner).mul_(ctx.scaling)
        return of_x, None, None, _summed(within.T, rows), of_up, None


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Their product in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
