"""What is trained: a transformers model, with an adapter or without, and its loss on packed rows.

It is a module of its own, so that Trainer's wrappers for several processes find their gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgedistill.errors import MissingTool
from edgedistill.torch_runtime import device
from edgedistill.training.head import nll_of, token_losses
from edgedistill.training.loss import autocast
from edgedistill.training.packing import Part, hidden_states, pack, packed_attention, split

Loss = Callable[[Any, Part], Tensor]


def nll_loss(model: Any, part: Part) -> Tensor:
    """Negative log-likelihood of the supervised tokens, each by its weight; the sum, in nats."""
    losses = token_losses(model, hidden_states(model, part), nll_of(part["labels"]))
    return (losses * part["weights"]).sum()


class Learner(torch.nn.Module):  # type: ignore[misc]
    """`model`, adapted by peft or not; `loss(transformers model, part)` is summed over a part."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.sharded = False  # see sharding.py, which places its parameters
        self._loss = loss

    @property
    def plain(self) -> Any:
        """The transformers model itself; with adapter layers in it where there are any."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def to(self, *args: Any, **kwargs: Any) -> Learner:
        """As of any module; a sharded one is where it belongs."""
        return self if self.sharded else super().to(*args, **kwargs)

    def compute_twice(self) -> None:
        """Compute activations again in the backward pass instead of keeping them (gradient
        checkpointing: Chen et al. 2016, arXiv 1604.06174)."""
        plain = self.plain  # transformers is about to rename it
        enable = getattr(plain, "activation_checkpointing_enable", None)
        (enable or plain.gradient_checkpointing_enable)({"use_reentrant": False})

    def compile_layers(self) -> None:
        """Compile what is not attention of each layer (torch.compile), for rows of any length.

        Raises:
            MissingTool: there is no compiler for this device.
        """
        _require_compiler(device().type)
        for layer in self.plain.get_decoder().layers:
            layer.mlp.compile(dynamic=True)

    def forward(self, part: Part) -> Tensor:
        return self._loss(self.plain, part)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Of what is trained alone: that is all that a checkpoint needs."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().load_state_dict(state_dict, strict=False)
        # What is frozen comes from the checkpoint folder that the model was made of.
        missing = [name for name in found.missing_keys if name in self.state_dict()]
        return type(found)(missing, found.unexpected_keys)


def _require_compiler(kind: str) -> None:
    if kind == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        what, name = "no C++ compiler", "a C++ compiler"
    elif kind != "cpu" and importlib.util.find_spec("triton") is None:
        what, name = "no Triton", "the package triton"
    else:
        return
    raise MissingTool(
        f"distill.compile is set, and there is {what} here",
        hint=f"install {name}, or leave distill.compile out",
    )


class Packer:
    """Batches for `backward`, on process `rank` of `world`: {"parts", "total"}.

    `total`, by which losses are divided, is what the batch's units (see the rows) weigh on average
    over all rows, as a share of one process: a batch of light rows teaches less, and DDP takes the
    mean over processes.
    """

    def __init__(
        self, tokens: int, rank: int = 0, world: int = 1, mean_weight: float = 1.0
    ) -> None:
        self._tokens, self._rank, self._world = tokens, rank, world
        self._mean_weight = mean_weight

    def __call__(self, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
        rows = [row for batch in batches for row in batch]
        total = self._mean_weight * sum(row.units for row in rows)
        shares = [split(rows[at :: self._world], self._tokens) for at in range(self._world)]
        own, most = shares[self._rank], max(map(len, shares))
        # Every process takes part in every step and, where layers are shared out, in every part.
        own += [[rows[0].unweighted()]] * (most - len(own))
        return {"parts": [self.pack(part) for part in own], "total": total / self._world}

    def pack(self, rows: Sequence[Any]) -> Part:
        return pack(rows)


def mean_weight(rows: Sequence[Any]) -> float:
    """What a unit of the rows weighs on average."""
    return float(sum(row.weight * row.units for row in rows) / sum(row.units for row in rows))


def backward(
    model: Any, batch: Mapping[str, Any], run_backward: Callable[[Tensor], None], precision: str
) -> Tensor:
    """Accumulate the gradient of a batch, part by part; its mean loss (without a gradient).

    `model` is a Learner, or what Trainer has wrapped it in.
    """
    learner = getattr(model, "module", model)
    where, total = next(learner.parameters()).device, None
    for index, part in enumerate(batch["parts"], 1):
        last = index == len(batch["parts"])
        alone = contextlib.nullcontext() if last else getattr(model, "no_sync", _nothing)()
        with alone, packed_attention(learner.plain):
            with autocast(where, precision):
                loss = model(part) / batch["total"]
            run_backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def _nothing() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def hold_in_bf16(model: Any, device_type: str) -> None:
    """Frozen weights in the precision that they are multiplied in: half the memory, and no cast in
    each step. On a CPU matrices alone, which autocast rounds the same way; on a GPU, where moving
    bytes is what most of a step waits for, norms and embeddings too, and what flows between layers
    with them."""
    if device_type == "cuda":
        _hold_all_in_bf16(model)
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            shared = module.weight is model.get_input_embeddings().weight
            if not shared and module.weight.dtype == torch.float32:
                module.to(torch.bfloat16)


def _hold_all_in_bf16(model: Any) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.modules():
        # peft would make fp32 of what goes into an adapter, and autocast bf16 of that again.
        if hasattr(module, "cast_input_dtype_enabled") and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False
