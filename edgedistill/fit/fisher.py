"""The predicted KLD of every matrix in every number format, from one backward pass a prompt.

Near the unquantized weights, KL(p || p') of a prediction is half the Fisher information along the
change of the weights. The Fisher information is the mean of squared score products <grad log p(y),
dW> over labels y drawn from the model itself (Amari 1998; Martens 2020, arXiv 1412.1193), so one
backward pass tells about every matrix and every format at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgedistill.fit.formats import quantize_dequantize
from edgedistill.number_formats import usable
from edgedistill.progress import Progress
from edgedistill.tensors import matrices, read_layout
from edgedistill.torch_runtime import device, load_model

CHANGE_BYTES = 2_000_000_000  # f16 changes of weights held at once; more formats take more passes

Costs = dict[str, dict[str, float]]


def measured(
    folder: Path,
    asked: Sequence[tuple[list[int], list[int]]],
    types: Sequence[str],
    seed: int,
    progress: Progress,
) -> Costs:
    model = load_model(folder).to(device()).eval()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    changes = _passes(model, folder, types)
    costs: Costs = {}
    with progress.task("measure sensitivity", len(asked) * len(changes), "prompts") as task:
        for group in changes:
            costs |= _one_pass(model, group, asked, seed, task.advance)
    return costs


@dataclass(frozen=True)
class _Matrix:
    """One matrix, the formats it is tried in, and its parameter."""

    name: str
    types: tuple[str, ...]
    parameter: Any


def _passes(model: Any, folder: Path, types: Sequence[str]) -> list[list[_Matrix]]:
    """All matrices, in groups whose changes fit into CHANGE_BYTES."""
    own = dict(model.named_parameters())
    groups: list[list[_Matrix]] = [[]]
    used = 0
    for name, (source, _, columns) in matrices(read_layout(folder)).items():
        kinds = tuple(dict.fromkeys(usable(each, columns) for each in types))
        size = own[source].numel() * len(kinds) * 2
        if groups[-1] and used + size > CHANGE_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(_Matrix(name, kinds, own[source]))
        used += size
    return groups


def _one_pass(
    model: Any,
    group: Sequence[_Matrix],
    asked: Sequence[tuple[list[int], list[int]]],
    seed: int,
    advance: Callable[[], None],
) -> Costs:
    squares = {matrix.name: torch.zeros(len(matrix.types)) for matrix in group}
    hooks = [_watch(matrix, _changes(matrix), squares[matrix.name]) for matrix in group]
    chance = torch.Generator().manual_seed(seed)
    tokens = 0
    for prompt, answer in asked:
        ids = torch.tensor([prompt + answer[:-1]], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=chance)
        score = logits.log_softmax(-1).gather(1, drawn.to(model.device)).sum()
        score.backward()
        tokens += len(answer)
        advance()
    for hook, matrix in zip(hooks, group, strict=True):
        hook.remove()
        matrix.parameter.requires_grad_(False)
    return {
        matrix.name: dict(
            zip(matrix.types, (squares[matrix.name] / (2 * tokens)).tolist(), strict=True)
        )
        for matrix in group
    }


@torch.no_grad()  # type: ignore[untyped-decorator]
def _changes(matrix: _Matrix) -> Any:
    """f16 [types, weights]: what each format does to the matrix."""
    weight = matrix.parameter.detach()
    made = [(quantize_dequantize(weight, kind) - weight).half().flatten() for kind in matrix.types]
    return torch.stack(made)


def _watch(matrix: _Matrix, changes: Any, squares: Any) -> Any:
    """Take each gradient as it comes and let it go: all of them together are a model's size."""
    matrix.parameter.requires_grad_(True)

    def take(parameter: Any) -> None:
        for index, change in enumerate(changes):
            squares[index] += torch.dot(change.float(), parameter.grad.flatten()).cpu() ** 2
        parameter.grad = None

    return matrix.parameter.register_post_accumulate_grad_hook(take)
