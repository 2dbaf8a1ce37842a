"""Training rows and the order they are seen in: what is supervised, and what is never padded."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edgedistill.errors import DatasetError, TrainingError
from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt

IGNORED = -100  # torch's label for "no loss here"
BUCKET = 8  # batches that are sorted by length together
# A batch goes through the model in parts of about this many tokens: the gradient is the same, the
# activations in memory are not. Matrices of this many rows keep a core busy already.
PART_TOKENS = {"cpu": 512, "cuda": 16384}
CHUNK_BYTES = 128 << 20  # of fp32 logits at once; some copies of that size are made on the way

Row = TypeVar("Row", bound=Sized)  # a TrainingRow, or several that belong together


@dataclass(frozen=True)
class TrainingRow:
    """Token IDs of one row; only `answer`, whose last token is the stop token, is supervised.

    `general`: no teacher said it, so it is only compared with what another model predicts there.
    Running text has an `answer` that is all but its first token, without a stop token. `weight` is
    what each of its supervised tokens counts, beside those of other rows.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    general: bool = False
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def supervised(self) -> int:
        """Tokens that the teacher said."""
        return 0 if self.general else len(self.answer)

    @property
    def units(self) -> int:
        """What a mean loss is taken over: supervised tokens."""
        return self.supervised

    def unweighted(self) -> TrainingRow:
        """The same row, from which nothing is learnt."""
        return replace(self, weight=0.0)


def training_rows(
    rows: Sequence[EvalRow], prompt: StudentPrompt, max_length: int | None
) -> list[TrainingRow]:
    """Tokenize rows and hold each to what supervision promises; None: of any length.

    Raises:
        DatasetError: there are no rows.
        TrainingError: a row is longer than `max_length` tokens, has an empty answer, or the stop
            token is anywhere but at its end.
    """
    if not rows:
        raise DatasetError(
            "no training rows are left after curation",
            hint="look at rejected.jsonl for the reasons, or give more prompts",
        )
    made = []
    for row in rows:
        asked, answer = prompt.prompt_ids(row.prompt, row.history), prompt.answer_ids(row.answer)
        training = TrainingRow(row.id, tuple(asked), tuple(answer), weight=row.weight)
        _require_promises(training, prompt.stop_id, max_length)
        made.append(training)
    return made


def _require_promises(row: TrainingRow, stop_id: int, max_length: int | None) -> None:
    if max_length is not None and len(row) > max_length:
        raise TrainingError(
            f"this row has {len(row)} tokens, more than distill.max_length ({max_length}); "
            "cutting it would cut off its stop token",
            where=row.id,
            hint="raise distill.max_length, or lower curate.max_answer_chars",
        )
    if len(row.answer) < 2 or not row.prompt:
        raise TrainingError("this row has nothing to learn: its answer is empty", where=row.id)
    if row.answer.index(stop_id) != len(row.answer) - 1:
        raise TrainingError(
            "the answer contains the student's stop token before its end",
            where=row.id,
            hint="take this answer out of the token mix",
        )


def require_context(rows: Iterable[TrainingRow], tokens: int, why: str | None) -> None:
    """Refuse rows of more `tokens` than the student computes alike wherever they stand.

    Raises:
        TrainingError: names the first such row.
    """
    for row in rows:
        if len(row) > tokens:
            raise TrainingError(
                f"this row has {len(row)} tokens, the student's context {tokens}; "
                f"{why or 'it knows no position behind it'}",
                where=row.id,
                hint="take it out of the token mix, or choose another student.weights",
            )


def plan_batches(rows: Sequence[Row], size: int, epochs: float, seed: int) -> list[list[Row]]:
    """Every batch of the run in order, decided by the seed alone."""
    return plan_epochs([rows] * math.ceil(epochs), size, epochs, seed)


def plan_epochs(
    rows_of: Sequence[Sequence[Row]], size: int, epochs: float, seed: int
) -> list[list[Row]]:
    """The same where each epoch has rows of its own; the run is as long as if each had as many as
    the first, which only those differ from whose altered prompts became too long each time.

    In each epoch rows are shuffled, sorted by length within groups of BUCKET batches, cut into
    batches, and the batches shuffled: little padding, and no order by length.
    """
    per_epoch = math.ceil(len(rows_of[0]) / size)
    batches: list[list[Row]] = []
    for epoch, rows in enumerate(rows_of):
        chance = random.Random(f"{seed}-{epoch}")
        shuffled = chance.sample(list(rows), len(rows))
        made = []
        for start in range(0, len(shuffled), size * BUCKET):
            group = sorted(shuffled[start : start + size * BUCKET], key=len)
            made += [group[at : at + size] for at in range(0, len(group), size)]
        chance.shuffle(made)
        batches += made
    return batches[: max(1, round(per_epoch * epochs))]


def collate(items: Sequence[Sequence[TrainingRow]], pad_id: int) -> dict[str, Any]:
    """Tensors [rows, longest]: input_ids, attention_mask and labels, padded on the right; and
    general [rows], true for text that no teacher answered."""
    import torch

    rows = [row for batch in items for row in batch]
    longest = max(map(len, rows))
    ids, mask, labels = [], [], []
    for row in rows:
        rest = longest - len(row)
        ids.append([*row.prompt, *row.answer, *[pad_id] * rest])
        mask.append([1] * len(row) + [0] * rest)
        labels.append([IGNORED] * len(row.prompt) + [*row.answer] + [IGNORED] * rest)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "general": torch.tensor([row.general for row in rows]),
    }


def split_batch(batch: Any, tokens: int) -> list[dict[str, Any]]:
    """The batch in parts of at most `tokens` tokens (one row at least), each cut to its longest
    row: activations of a part are all that is in memory at once."""
    rows, longest = batch["input_ids"].shape
    size = max(1, tokens // longest)
    parts = []
    for start in range(0, rows, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        width = int(part["attention_mask"].sum(1).max())
        parts.append({n: t[:, :width] if t.ndim > 1 else t for n, t in part.items()})
    return parts
