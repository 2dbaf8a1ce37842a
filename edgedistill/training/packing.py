"""Rows one behind the other: nothing is computed that is not of a row.

Linear layers see [1, tokens, width]; attention sees each row by itself, so that none looks at
another, and positions start anew with each (padding-free batches: Krell et al. 2021, arXiv
2107.02027). No layer but attention mixes tokens, so the loss is that of rows computed alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from edgedistill.training.data import TrainingRow

PACKED = "edgedistill_packed"
APART = ("cpu",)  # where a kernel for each row costs less than one for all with padding
Part = dict[str, Any]


def pack(rows: Sequence[TrainingRow]) -> Part:
    """Tensors of one packed sequence of n tokens, s of them supervised.

    input_ids, position_ids [1, n]; at [s], the positions that predict supervised tokens; labels
    [s]; row [s], the row of each, and weights [s], what it counts; packing, what attention needs:
    the lengths of the rows and, for rows padded to the longest, places [n], where each token is in
    them, and tokens [rows * longest], which token is at each place; n where it is padding, for
    which `filled` names some other token.
    """
    longest = max(map(len, rows))
    ids, positions, at, labels, places = [list[int]() for _ in range(5)]
    tokens = torch.full((len(rows), longest), sum(map(len, rows)))
    row_of, weights = list[int](), list[float]()
    for index, row in enumerate(rows):
        begin, length = len(ids), len(row)
        ids += [*row.prompt, *row.answer]
        positions += range(length)
        first = begin + len(row.prompt) - 1
        at += range(first, first + len(row.answer))
        labels += row.answer
        row_of += [index] * len(row.answer)
        weights += [row.weight] * len(row.answer)
        places += range(index * longest, index * longest + length)
        tokens[index, :length] = torch.arange(begin, begin + length)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "at": torch.tensor(at),
        "labels": torch.tensor(labels),
        "row": torch.tensor(row_of),
        "weights": torch.tensor(weights),
        "packing": {
            "lengths": [len(row) for row in rows],
            "places": torch.tensor(places),
            "tokens": tokens.flatten(),
            "filled": tokens.flatten().clamp(max=len(ids) - 1),
        },
    }


def split(rows: Sequence[Any], tokens: int) -> list[list[Any]]:
    """Consecutive rows in as few parts as hold at most `tokens` tokens each (one row at least)."""
    parts: list[list[Any]] = []
    used = 0
    for row in rows:
        if not parts or used + len(row) > tokens:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += len(row)
    return parts


def moved(value: Any, where: torch.device) -> Any:
    """The tensors of a part, or of a whole batch, on a device."""
    if isinstance(value, dict):
        return {name: moved(each, where) for name, each in value.items()}
    if isinstance(value, list):
        return [moved(each, where) for each in value]
    return value.to(where) if hasattr(value, "to") else value


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Within it, a transformers model takes packed rows; its backward pass belongs inside, too."""
    config = model.config
    usual = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = usual


def hidden_states(model: Any, part: Part) -> Tensor:
    """Outputs [s, width] of the decoder at the positions that predict supervised tokens."""
    found = model.get_decoder()(
        input_ids=part["input_ids"],
        position_ids=part["position_ids"],
        use_cache=False,
        packing=part["packing"],
    )
    return found.last_hidden_state[0, part["at"]]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: dict[str, Any],
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of each row by itself. query [1, heads, n, size], key and value [1, key heads, n,
    size]; gives [1, n, heads, size]."""
    lengths, whole = packing["lengths"], (query, key, value)
    if query.device.type in APART:
        rows = zip(*(tensor.split(lengths, 2) for tensor in whole), strict=True)
        return torch.cat([_causal(module, *row, **rest) for row in rows], 1), None
    # One kernel for all rows; the padding, on the right, is where no token of a row looks.
    places, shape = packing["places"], (len(lengths), max(lengths))
    padded = (
        _gathered(tensor[0].transpose(0, 1), packing["filled"], places)
        .view(*shape, tensor.shape[1], tensor.shape[3])
        .transpose(1, 2)
        for tensor in whole
    )
    found = _causal(module, *padded, **rest).flatten(0, 1)
    return _gathered(found, places, packing["tokens"])[None], None


def _gathered(held: Tensor, wanted: Tensor, back: Tensor) -> Tensor:
    """held[wanted]; `back` is where each of `held` went, behind the last where nowhere."""
    if len(wanted) == len(back):  # no padding: all are where they were
        return held
    found: Tensor = _Gathered.apply(held, wanted, back)
    return found


class _Gathered(torch.autograd.Function):  # type: ignore[misc]
    """Reads in both directions: writing to places from a list, a GPU would first have to sort them
    to be deterministic."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, wanted: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(wanted, back)
        return held.index_select(0, wanted)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None]:
        wanted, back = ctx.saved_tensors
        gradient = given[0]
        if len(back) > len(wanted):
            gradient = torch.cat([gradient, gradient.new_zeros(1, *gradient.shape[1:])])
        return gradient.index_select(0, back), None, None


def _causal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None = None,
    **rest: Any,
) -> Tensor:
    """[rows, longest, heads, size]."""
    length, mask = query.shape[2], None
    if sliding_window is not None and length > sliding_window:
        at = torch.arange(length, device=query.device)
        behind = at[:, None] - at[None, :]
        mask = ((behind >= 0) & (behind < sliding_window))[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **rest)[0]


AttentionInterface.register(PACKED, _attend)
