"""The loss on supervised tokens, a part of a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgedistill.training.data import IGNORED, PART_TOKENS, split_batch

BF16 = {"fp32": False, "bf16": True}  # `auto` must have been settled


def supervised_logits(model: Any, batch: Any) -> tuple[Any, Any]:
    """fp32 logits [n, vocab] and labels [n] of the n supervised tokens of [rows, longest] tensors.

    The output head runs on supervised positions only: with a vocabulary of tens of thousands it
    would otherwise cost as much as many layers. Rows are padded on the right, where a causal model
    never looks, so no attention mask is needed.
    """
    decoder = model.get_decoder()
    return supervised_head(
        model, decoder(input_ids=batch["input_ids"], use_cache=False).last_hidden_state, batch
    )


def supervised_head(model: Any, hidden: Any, batch: Any) -> tuple[Any, Any]:
    """The same of the decoder's output [rows, longest, width]."""
    import torch

    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][kept]).float()
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits, labels[kept]


def cross_entropy(logits: Any, labels: Any, reduction: str) -> Any:
    """Negative log-likelihood ("mean" or "sum")."""
    import torch

    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)


def in_parts(
    batch: Any,
    precision: str,
    run_backward: Callable[[Any], None],
    loss_sum: Callable[[Any], Any],
) -> Any:
    """Accumulate the gradient of `loss_sum` over the batch's supervised tokens, part by part;
    returns the mean loss (a scalar tensor without a gradient)."""
    import torch

    where = batch["labels"].device
    supervised = (batch["labels"] != IGNORED).sum()
    total = supervised.new_zeros((), dtype=torch.float32)
    for part in split_batch(batch, PART_TOKENS[where.type]):
        with autocast(where, precision):
            loss = loss_sum(part) / supervised
        run_backward(loss)
        total += loss.detach()
    return total


def autocast(where: Any, precision: str) -> Any:
    """Context that computes in `precision` on the torch device `where`, whatever weights are in."""
    import torch

    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=BF16[precision])
