"""General text for a student that must not forget what it was not asked: its own.

The unquantized student writes it (data-free distillation: LLM-QAT, Liu et al. 2023, arXiv
2305.17888), so any student in any language has some, and none has to be licensed.
"""

from __future__ import annotations

from typing import Any

from edgedistill.progress import Task
from edgedistill.training.data import TrainingRow

LENGTH = 48  # tokens of one text
BATCH = 32
GREEDY = 4  # tokens after the first that are the likeliest: a start that makes sense


def general_rows(
    model: Any, count: int, begin: int | None, seed: int, task: Task
) -> list[TrainingRow]:
    """`count` texts of LENGTH tokens, each from a random first token (after `begin`, the BOS,
    where the model wants one), sampled at temperature 1; decided by the seed alone."""
    import torch

    chance = torch.Generator().manual_seed(seed)
    rows: list[TrainingRow] = []
    vocabulary = model.config.vocab_size
    while len(rows) < count:
        size = min(BATCH, count - len(rows))
        first = torch.randint(vocabulary, (size, 1), generator=chance)
        ids = first if begin is None else torch.cat([torch.full((size, 1), begin), first], 1)
        ids = _written(model, ids, chance)
        rows += [
            TrainingRow(f"general-{len(rows) + i}", (row[0],), tuple(row[1:]), general=True)
            for i, row in enumerate(ids.tolist())
        ]
        task.advance(size)
    return rows


def _written(model: Any, ids: Any, chance: Any) -> Any:
    import torch

    cache, given = None, ids.to(model.device)
    with torch.inference_mode():
        while ids.shape[1] < LENGTH:
            made = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache, logits = made.past_key_values, made.logits[:, -1].float().cpu()
            if ids.shape[1] <= GREEDY:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=chance)
            ids = torch.cat([ids, chosen], 1)
            given = chosen.to(model.device)
    return ids
