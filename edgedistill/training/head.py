"""The output head, a chunk of tokens at a time: logits of a large vocabulary are never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from edgedistill.training.data import CHUNK_BYTES

Losses = Callable[[Tensor, slice], Tensor]


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """fp32 logits [c, vocabulary] of hidden states [c, width]."""
    logits = model.get_output_embeddings()(hidden).float()
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def token_losses(model: Any, hidden: Tensor, losses_of: Losses) -> Tensor:
    """`losses_of(logits [c, vocabulary], chosen)`, one figure a token, over all of [s, width];
    `chosen` says which tokens they are.

    Each token's loss depends on its own hidden state alone. So where the head is frozen, gradients
    are taken while a chunk's logits are there (as Liger-Kernel's fused loss does: Hsu et al. 2024,
    arXiv 2410.10989); a trained head computes them again in the backward pass.
    """
    size = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    head = model.get_output_embeddings()

    def losses(part: Tensor, chosen: slice) -> Tensor:
        return losses_of(head_logits(model, part), chosen)

    trained = any(parameter.requires_grad for parameter in head.parameters())
    if hidden.requires_grad and not trained:
        found: Tensor = _Chunked.apply(hidden, losses, size)
        return found
    chunks = [(hidden[s : s + size], slice(s, s + size)) for s in range(0, len(hidden), size)]
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([losses(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def nll_of(labels: Tensor) -> Losses:
    """Negative log-likelihood of labels [s], in nats."""
    return lambda logits, chosen: cross_entropy(logits, labels[chosen], reduction="none")


class _Chunked(torch.autograd.Function):  # type: ignore[misc]
    """Losses [s] of hidden states [s, width]; their gradients are made on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Losses, size: int) -> Tensor:
        found, gradients = [], torch.empty_like(hidden)
        for start in range(0, len(hidden), size):
            chosen = slice(start, start + size)
            part = hidden[chosen].detach().requires_grad_()
            with torch.enable_grad():
                made = losses(part, chosen)
                whole = made.sum()
            (gradients[chosen],) = torch.autograd.grad(whole, part)
            found.append(made.detach())
        ctx.save_for_backward(gradients)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return given[0][:, None] * gradients, None, None
