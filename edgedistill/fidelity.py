"""How far one model's predictions are from another's: KL divergence per answer token.

Logits are recorded as rows of float32 in plain files and compared in blocks in float64, so that
two models never have to be in memory at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.prompting import StudentPrompt

SCRATCH_BYTES = 2_000_000_000  # per recorded model; two lie on the disk at once
FLOAT_BYTES = 4
BLOCK_BYTES = 8 << 20  # float64 bytes of one block; the work needs about five of that size
# A row with a logit that is not finite counts as this many nats: beyond any bound, and still JSON.
NOT_FINITE = 1e6

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kld:
    """KL(before || after) in nats over `tokens` rows; `top1` is the share of rows with the same
    most likely token."""

    mean_kld: float
    p99_kld: float
    max_kld: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class EvalRow:
    """One row of a dataset: a prompt and the teacher's cleaned answer. `weight`: what it counts in
    training, by the token mix and by curation."""

    id: str
    prompt: str
    answer: str
    phrasing: str
    seen: bool
    weight: float = 1.0
    reference: str | None = None
    history: tuple[Mapping[str, str], ...] = ()  # messages before the prompt


def read_rows(file: Path) -> list[EvalRow]:
    """Rows of a dataset's JSONL file, in file order."""
    with file.open(encoding="utf-8") as stream:  # not splitlines: a prompt may hold U+2028
        return [_row(json.loads(line)) for line in stream if line.strip()]


def _row(value: dict[str, Any]) -> EvalRow:
    return EvalRow(
        id=value["id"],
        prompt=value["prompt"],
        answer=value["answer"],
        phrasing=value["phrasing"],
        seen=value["seen"],
        weight=value.get("weight", 1.0) * value.get("score", 1.0),
        reference=value.get("reference"),
        history=tuple(value.get("history", ())),
    )


def follows(likely: Sequence[int], answer: Sequence[int], max_tokens: int) -> bool:
    """Whether a model's greedy answer is `answer` (token IDs with the stop token), given its most
    likely token at each place of it: speculative decoding with the answer as the draft
    (Leviathan et al. 2023, arXiv 2211.17192)."""
    return list(likely) == list(answer) and len(answer) - 1 <= max_tokens


def rows_that_fit(
    rows: Sequence[EvalRow], prompt: StudentPrompt, limit: int = SCRATCH_BYTES
) -> list[EvalRow]:
    """As many rows as the logits of their answers fit into `limit` bytes, chosen by ID alone."""
    kept, used = set(), 0
    for row in sorted(rows, key=lambda row: shuffled(row.id, 0)):
        used += len(prompt.answer_ids(row.answer)) * prompt.vocab_size * FLOAT_BYTES
        if used > limit:
            break
        kept.add(row.id)
    return [row for row in rows if row.id in kept]


def shuffled(row_id: str, seed: int) -> str:
    """A sort key that shuffles rows by ID alone: one row more or less moves no other."""
    return hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()


def record(rows: Iterable[Logits], into: Path) -> int:
    """Append arrays [n, vocab] to the file `into` as float32 rows; returns the number of rows."""
    count = 0
    with into.open("ab") as stream:
        for block in rows:
            stream.write(np.ascontiguousarray(block, np.float32).tobytes())
            count += len(block)
    return count


def compare(before: Path, after: Path, vocab: int, columns: Sequence[int] | None = None) -> Kld:
    """KLD of two files of recorded rows [n, vocab]; see `per_token` for `columns`.

    Raises:
        ValueError: the files do not hold the same number of whole rows, or none.
    """
    return summarise(*per_token(before, after, vocab, None, columns))


def per_token(
    before: Path,
    after: Path,
    vocab: int,
    skip: int | None = None,
    columns: Sequence[int] | None = None,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """KLD [n] and "same most likely token" [n] of each row of `after` against the rows of `before`
    from row `skip` on. Where `skip` is None both files must have the same length.

    `vocab` is that of `before`. Where `after` has a smaller one, `columns` holds the token IDs
    that its tokens have in `before`, whose predictions are then taken among those tokens alone.

    Raises:
        ValueError: the files do not hold the same number of whole rows, or none.
    """
    width, begin = vocab if columns is None else len(columns), skip or 0
    rows_before = before.stat().st_size / (vocab * FLOAT_BYTES) - begin
    rows_after = after.stat().st_size / (width * FLOAT_BYTES)
    wrong = rows_before != rows_after if skip is None else rows_before < rows_after
    if wrong or rows_after == 0 or rows_after % 1:
        raise ValueError(
            f"{before.name} holds {rows_before:g} rows of {vocab} logits from row {begin} "
            f"on, {after.name} holds {rows_after:g} of {width}"
        )
    rows, block = int(rows_after), max(1, BLOCK_BYTES // (vocab * 8))
    klds, same = [], []
    with before.open("rb") as first, after.open("rb") as second:
        first.seek(begin * vocab * FLOAT_BYTES)
        for start in range(0, rows, block):
            count = min(block, rows - start)
            p = np.fromfile(first, np.float32, count * vocab).reshape(-1, vocab)
            q = np.fromfile(second, np.float32, count * width).reshape(-1, width)
            p = p if columns is None else p[:, columns]
            klds.append(kl_divergence(p, q))
            same.append(p.argmax(1) == q.argmax(1))
    return np.concatenate(klds), np.concatenate(same)


def read_logits(file: Path, rows: int, begin: int = 0) -> Logits:
    """The recorded rows [rows, vocab] from byte `begin` to the end of `file`."""
    return np.fromfile(file, np.float32, offset=begin).reshape(rows, -1)


def nll(rows: Logits, answer: Sequence[int]) -> Floats:
    """Negative log-likelihood in nats of each token of `answer` [n] under rows [n, vocab].

    A row with a logit that is not finite counts as NOT_FINITE nats.
    """
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(rows), axis=1)
    log_p = _log_softmax(np.where(finite[:, np.newaxis], rows, 0))
    return np.where(finite, -log_p[np.arange(len(answer)), list(answer)], NOT_FINITE)


def kl_divergence(before: Logits, after: Logits) -> Floats:
    """KL(softmax(before) || softmax(after)) of each row [n, vocab], in nats, in float64."""
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(before) & np.isfinite(after), axis=1)
    keep = finite[:, np.newaxis]
    log_p = _log_softmax(np.where(keep, before, 0))
    difference = log_p - _log_softmax(np.where(keep, after, 0))
    np.exp(log_p, out=log_p)
    kld = np.maximum(np.einsum("ij,ij->i", log_p, difference), 0.0)  # rounding goes below zero
    return np.where(finite, kld, NOT_FINITE)


def _log_softmax(logits: npt.NDArray[Any]) -> Floats:
    values = logits.astype(np.float64)
    values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def summarise(kld: Floats, same: npt.NDArray[np.bool_]) -> Kld:
    """Figures over the per-token values [n] of one comparison."""
    return Kld(
        mean_kld=float(kld.mean()),
        p99_kld=float(np.quantile(kld, 0.99)),
        max_kld=float(kld.max()),
        top1=float(same.mean()),
        tokens=len(kld),
    )
