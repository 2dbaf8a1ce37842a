"""Rows to train tiny models on, and their loss, packed and padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny import STOP

from edgedistill.training.data import TrainingRow, collate


def rows_of_lengths(*lengths: int, answer: int = 4) -> list[TrainingRow]:
    """Rows whose tokens all differ from those of the same place in another row."""
    return [
        TrainingRow(
            f"row-{i}",
            tuple(3 + (7 * i + 3 * at) % 200 for at in range(length - answer)),
            (*(3 + (11 * i + 5 * at) % 200 for at in range(answer - 1)), STOP),
        )
        for i, length in enumerate(lengths)
    ]


def packed_loss(model: Any, rows: Sequence[TrainingRow], tokens: int = 4096) -> Any:
    """Mean loss a token; gradients are left in the model."""
    from edgedistill.training.learner import Learner, Packer, backward, mean_weight, nll_loss

    batch = Packer(tokens, mean_weight=mean_weight(rows))([rows])
    return backward(Learner(model, nll_loss), batch, lambda loss: loss.backward(), "fp32")


def padded(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """What a transformers model itself takes."""
    made = collate([rows], STOP)
    del made["general"]
    return made
