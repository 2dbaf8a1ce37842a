"""A student that computes with what its number formats can hold, and learns behind them.

Latent fp32 weights are kept beside the model's own; before each step the model's matrices become
the quantized values of the latent ones, and the gradient that arrives at them is given to the
latent ones as it is (straight-through: Bengio, Leonard and Courville 2013, arXiv 1308.3432). All
parts of a batch share one quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgedistill.fit.formats import (
    FUSED,
    Grid,
    freeze,
    is_searched,
    quantize_dequantize,
    quantize_on,
)
from edgedistill.tensors import read_layout

ALPHA_OVER_RANK = 2.0  # the scale of a LoRA update, as distillation's default has it

SEARCH_EVERY = 10  # steps from one search for scales to the next


class Latent(torch.nn.Module):  # type: ignore[misc]
    """The trained weights of `model`; `model` itself is what computes.

    `types` is the number format of each trained matrix, by the model's parameter name. With a
    `rank` only a LoRA update of that rank is trained, of every matrix but the embedding.
    """

    def __init__(
        self,
        model: Any,
        types: Mapping[str, str],
        rank: int | None,
        seed: int,
        importance: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        # Not registered as a submodule: it is neither trained nor saved.
        self.__dict__["model"] = model
        self.types, self.importance = dict(types), dict(importance)
        self._own = dict(model.named_parameters())
        self._start = {name: self._own[name].detach().clone() for name in types}
        self._grids: dict[str, Grid] = {}
        self._steps = 0
        self.trained = torch.nn.ParameterDict()
        chance = torch.Generator().manual_seed(seed)
        skipped = rank is not None
        self._learning = [n for n in types if not (skipped and _is_embedding(model, n))]
        for name in self._learning:
            for part, value in self._fresh(name, rank, chance).items():
                self.trained[_key(name, part)] = torch.nn.Parameter(value)
        for name, parameter in self._own.items():
            parameter.requires_grad_(name in self._learning)

    def _fresh(self, name: str, rank: int | None, chance: torch.Generator) -> dict[str, Tensor]:
        start = self._start[name]
        if rank is None:
            del self._start[name]  # the parameter itself holds it from here on
            return {"weight": start}
        rows, columns = start.shape
        bound = 1.0 / math.sqrt(columns)  # peft's: Kaiming's with a = sqrt(5)
        down = torch.empty(rank, columns).uniform_(-bound, bound, generator=chance)
        return {"A": down, "B": torch.zeros(rows, rank)}

    def weight(self, name: str) -> Tensor:
        """The latent fp32 matrix [rows, columns]."""
        if _key(name, "weight") in self.trained:
            return self.trained[_key(name, "weight")].detach()
        if _key(name, "A") not in self.trained:
            return self._start[name]
        down, up = self.trained[_key(name, "A")], self.trained[_key(name, "B")]
        return torch.addmm(self._start[name], up.detach(), down.detach(), alpha=ALPHA_OVER_RANK)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def refresh(self, exact: bool = False) -> None:
        """The model's matrices become the quantized values of the latent ones.

        Formats whose scales are searched are rounded to those found a few steps ago, unless
        `exact`: what is measured is what the runtime's quantizer will write.
        """
        search = exact or self._steps % SEARCH_EVERY == 0
        self._steps += 0 if exact else 1
        for name, number_format in self.types.items():
            weight, importance = self.weight(name), self.importance.get(name)
            if not is_searched(number_format, importance is not None):
                value = quantize_dequantize(weight, number_format, importance)
            else:
                if search:
                    self._grids[name] = freeze(weight, number_format, importance)
                value = quantize_on(weight, self._grids[name])
                if exact and FUSED:  # where compilers fuse, only the library computes as it will
                    value = quantize_dequantize(weight, number_format, importance)
            self._own[name].copy_(value)
            self._own[name].grad = None

    def forget_scales(self) -> None:
        """Search them anew at the next step: a run that goes on from here has none either."""
        self._steps = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def collect(self) -> None:
        """Give the gradients that arrived at the model's matrices to what is trained."""
        for name in self._learning:
            given = self._own[name].grad
            if given is None:
                continue
            if _key(name, "weight") in self.trained:
                self.trained[_key(name, "weight")].grad = given
            else:
                down, up = self.trained[_key(name, "A")], self.trained[_key(name, "B")]
                down.grad = ALPHA_OVER_RANK * (up.T @ given)
                up.grad = ALPHA_OVER_RANK * (given @ down.T)
            self._own[name].grad = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def expose(self) -> None:
        """The model's matrices become the latent ones: this is what is saved and exported."""
        for name in self.types:
            self._own[name].copy_(self.weight(name))


def types_by_parameter(folder: Path, types: Mapping[str, str]) -> dict[str, str]:
    """GGUF tensor -> format as the checkpoint's parameter -> format."""
    return {
        tensor.source: types[tensor.name]
        for tensor in read_layout(folder).tensors
        if tensor.name in types
    }


def _is_embedding(model: Any, name: str) -> bool:
    return bool(model.get_input_embeddings().weight is dict(model.named_parameters())[name])


def _key(name: str, part: str) -> str:
    return f"{name.replace('.', '/')}:{part}"  # a ParameterDict takes no dots
