"""The predicted KLD of every matrix in every number format, from one backward pass a prompt.

Near the unquantized weights, KL(p || p') of a prediction is half the Fisher information along the
change of the weights. The Fisher information is the mean of squared score products <grad log p(y),
dW> over labels y drawn from the model itself (Amari 1998; Martens 2020, arXiv 1412.1193), so one
backward pass tells about every matrix and every format at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgedistill.fit.trial import Asked, Trial
from edgedistill.memory import freed_memory_kept
from edgedistill.number_formats import usable
from edgedistill.progress import Progress

CHANGE_BYTES = 2_000_000_000  # f16 changes of weights held at once; more formats take more passes

Costs = dict[str, dict[str, float]]


def measured(
    trial: Trial, asked: Asked, types: Sequence[str], seed: int, progress: Progress
) -> Costs:
    """GGUF name -> type -> KLD in nats a token; `asked` is what backward passes are made of.

    Errors of many matrices may add up: rounding to the grid that a base was stored in undoes what
    it has learnt since, everywhere in the same direction. So each type is also tried in all
    matrices at once, and its costs are scaled to what that really does.
    """
    model = trial.model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups = _passes(trial, types)
    costs: Costs = {}
    with (
        progress.task("measure sensitivity", len(asked) * len(groups), "prompts") as task,
        freed_memory_kept(),
    ):
        for group in groups:
            costs |= _one_pass(trial, group, asked, seed, task.advance)
    kinds = sorted({kind for by_type in costs.values() for kind in by_type})
    with progress.task("try each type everywhere", len(kinds), "types") as task:
        for kind in kinds:
            _scale(costs, kind, trial)
            task.advance(shown=kind)
    return costs


def _scale(costs: Costs, kind: str, trial: Trial) -> None:
    names = [name for name, by_type in costs.items() if kind in by_type]
    predicted = sum(costs[name][kind] for name in names)
    if predicted > 0:
        factor = trial.kld(dict.fromkeys(names, kind)) / predicted
        for name in names:
            costs[name][kind] *= factor


@dataclass(frozen=True)
class _Matrix:
    """One matrix, the formats it is tried in, and its parameter."""

    name: str
    types: tuple[str, ...]
    parameter: Any


def _passes(trial: Trial, types: Sequence[str]) -> list[list[_Matrix]]:
    """All matrices, in groups whose changes fit into CHANGE_BYTES."""
    groups: list[list[_Matrix]] = [[]]
    used = 0
    for name, parameter in trial.parameters.items():
        kinds = tuple(dict.fromkeys(usable(each, parameter.shape[1]) for each in types))
        size = parameter.numel() * len(kinds) * 2
        if groups[-1] and used + size > CHANGE_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(_Matrix(name, kinds, parameter))
        used += size
    return groups


def _one_pass(
    trial: Trial,
    group: Sequence[_Matrix],
    asked: Asked,
    seed: int,
    advance: Callable[[], None],
) -> Costs:
    squares = {matrix.name: torch.zeros(len(matrix.types)) for matrix in group}
    hooks = [_watch(each, _changes(trial, each), squares[each.name]) for each in group]
    model = trial.model
    chance = torch.Generator().manual_seed(seed)
    tokens = 0
    for prompt, answer in asked:
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
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
def _changes(trial: Trial, matrix: _Matrix) -> Any:
    """f16 [types, weights]: what each format does to the matrix."""
    weight = matrix.parameter.detach()
    made = [trial.quantized(matrix.name, kind) - weight for kind in matrix.types]
    return torch.stack([change.half().flatten() for change in made])


def _watch(matrix: _Matrix, changes: Any, squares: Any) -> Any:
    """Take each gradient as it comes and let it go: all of them together are a model's size."""
    matrix.parameter.requires_grad_(True)

    def take(parameter: Any) -> None:
        for index, change in enumerate(changes):
            squares[index] += torch.dot(change.float(), parameter.grad.flatten()).cpu() ** 2
        parameter.grad = None

    return matrix.parameter.register_post_accumulate_grad_hook(take)
