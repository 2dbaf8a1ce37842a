"""Measure an importance matrix: run a checkpoint over texts and sum the squares of what goes into
each matrix, by hooks, under the names the matrices have in GGUF.

The same sums as llama.cpp's tools/imatrix/imatrix.cpp, but in float64 over a model in float32, and
with the head: in a tied model its matrix is `token_embd.weight`, which llama.cpp never measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.importance import Importance
from edgedistill.progress import SilentTask, Task
from edgedistill.tensors import Layout, read_layout
from edgedistill.torch_runtime import PART_TOKENS, device, load_model

EMBEDDING, HEAD, WEIGHT = "token_embd.weight", "output.weight", ".weight"


def measure_importance(
    folder: Path,
    texts: Sequence[Sequence[int]],
    dataset: str,
    task: Task | None = None,
) -> Importance:
    """The importance of every matrix of a checkpoint over texts given as token IDs.

    Each text starts from an empty context and all of its tokens count. `dataset`: their name in the
    file; `task` advances by texts.

    Raises:
        DatasetError: there are no tokens.
        ArtifactError: the checkpoint cannot be loaded, or a value in it is not finite.
        MissingTool: torch or transformers is not installed.
    """
    tokens = sum(map(len, texts))
    if not tokens:
        raise DatasetError("there is no text to measure the importance of weights on")
    layout = read_layout(folder)
    model = load_model(folder).to(device()).eval()
    sums = _Sums()
    bar = task or SilentTask()
    with ExitStack() as hooks:
        _listen(model, layout, sums, folder, hooks)
        for part in _parts(texts):
            _run(model, part, sums, _head(layout))
            bar.advance(len(part))
    found = {name: total.float().cpu().numpy() for name, total in sums.totals.items()}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise ArtifactError("the model's activations are not finite", where=str(folder))
    counts = dict.fromkeys(found, float(tokens))
    return Importance(found, counts, (dataset,), len(texts), -(-tokens // len(texts)))


class _Sums:
    """Running sums of squares, float64 [columns] by tensor, of the tokens that `kept` marks."""

    def __init__(self) -> None:
        self.totals: dict[str, Any] = {}
        self.kept: Any = None  # bool [texts, tokens]: False where a text is padded

    def add(self, names: Sequence[str], given: Any) -> None:
        """`given`: the input [texts, tokens, columns] of the matrices `names`."""
        squares = given[self.kept].double().square().sum(0)
        for name in names:
            self.totals[name] = self.totals.get(name, 0) + squares


def _listen(model: Any, layout: Layout, sums: _Sums, folder: Path, hooks: ExitStack) -> None:
    """Hook every matrix of the blocks; several GGUF tensors may come from one module."""
    import torch

    modules = dict(model.named_modules())
    names: dict[str, list[str]] = {}
    for tensor in layout.tensors:
        module = modules.get(tensor.source.removesuffix(WEIGHT))
        if tensor.name.startswith("blk.") and isinstance(module, torch.nn.Linear):
            if tensor.source.endswith(WEIGHT):
                names.setdefault(tensor.source.removesuffix(WEIGHT), []).append(tensor.name)
        elif tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            raise ArtifactError(f"there is no layer for tensor {tensor.source}", where=str(folder))
    for source, own in names.items():
        hooks.callback(modules[source].register_forward_pre_hook(_hook(sums, own)).remove)


def _hook(sums: _Sums, names: list[str]) -> Callable[[Any, tuple[Any, ...]], None]:
    def hook(module: Any, given: tuple[Any, ...]) -> None:
        sums.add(names, given[0])

    return hook


def _head(layout: Layout) -> str:
    tied = not any(tensor.name == HEAD for tensor in layout.tensors)
    return EMBEDDING if tied else HEAD


def _run(model: Any, texts: Sequence[Sequence[int]], sums: _Sums, head: str) -> None:
    import torch

    longest = max(map(len, texts))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts])
    lengths = torch.tensor([len(ids) for ids in texts])
    sums.kept = (torch.arange(longest) < lengths[:, None]).to(model.device)
    with torch.inference_mode():
        # Without the head's own product, the largest of all: only what goes into it is wanted.
        # Padding is on the right, where a causal model never looks.
        last = model.base_model(input_ids=padded.to(model.device), use_cache=False)
        sums.add([head], last.last_hidden_state)


def _parts(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts of similar length in groups of at most PART_TOKENS tokens with padding, or of one."""
    part: list[Sequence[int]] = []
    for ids in sorted(filter(len, texts), key=len):
        if part and len(ids) * (len(part) + 1) > PART_TOKENS:
            yield part
            part = []
        part.append(ids)
    if part:
        yield part
