"""What a choice of number formats really does to predictions, in fp32 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.artifacts import Importance
from edgedistill.fidelity import kl_divergence
from edgedistill.fit.formats import quantize_dequantize
from edgedistill.importance import read_importance
from edgedistill.quantized_values import stored_together
from edgedistill.tensors import matrices, read_layout
from edgedistill.torch_runtime import TorchModel, load_model

ROWS = 20  # prompts that a trial looks at: two choices are compared on the same ones
Asked = Sequence[tuple[Sequence[int], Sequence[int]]]  # prompt and answer as token IDs


def means(importance: Importance | None) -> dict[str, np.ndarray[Any, Any]]:
    """The mean square of each column's inputs, by GGUF name; empty without an importance."""
    if importance is None:
        return {}
    found = read_importance(importance.file)
    return {name: found.mean(name) for name in found.sums}


class Trial:
    """A checkpoint whose matrices can be quantized for a moment; with `onnx` those that an ONNX
    model stores quantized.

    `importance`: mean squares of each matrix's inputs by GGUF name, for the search of scales.
    """

    def __init__(
        self,
        folder: Path,
        asked: Asked,
        importance: Mapping[str, np.ndarray[Any, Any]],
        onnx: bool = False,
    ) -> None:
        self.model = load_model(folder)
        self.model.config.use_cache = False
        own = dict(self.model.named_parameters())
        layout = read_layout(folder)
        stored = stored_together(layout, onnx)
        self.parameters = {
            name: own[source] for name, (source, _, _) in matrices(layout).items() if name in stored
        }
        self._importance = importance
        self._rows = [([*prompt, *answer], len(prompt)) for prompt, answer in asked[:ROWS]]
        self._runs = TorchModel.of(self.model)
        self._reference = list(self._runs.logits(self._rows))

    def quantized(self, name: str, kind: str) -> Any:
        """The matrix as the format stores it."""
        weight, given = self.parameters[name].detach(), self._importance.get(name)
        column = None if given is None else torch.from_numpy(given).to(weight.device)
        return quantize_dequantize(weight, kind, column)

    def kld(self, types: Mapping[str, str]) -> float:
        """Mean KLD, in nats a token, of the predictions with these matrices quantized."""
        with self._stored(types):
            made = self._runs.logits(self._rows)
            klds = [kl_divergence(p, q) for p, q in zip(self._reference, made, strict=True)]
        return float(np.concatenate(klds).mean())

    @contextmanager
    def _stored(self, types: Mapping[str, str]) -> Iterator[None]:
        before = {}
        try:
            for name, kind in types.items():
                parameter = self.parameters[name]
                before[name], parameter.data = parameter.data, self.quantized(name, kind)
            yield
        finally:
            for name, values in before.items():
                self.parameters[name].data = values
