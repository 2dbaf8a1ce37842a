"""Curated rows divided into train, validation and held_out, by prompt and by phrasing.

Hashes of the seed with a prompt's ID or its phrasing decide: changing one prompt moves as few
others as it can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgedistill.recipe import SplitSpec
from edgedistill.tokenmix import same_prompt


@dataclass(frozen=True)
class Row:
    """One curated prompt with what the student learns to answer; `seen` says whether a training
    prompt has the same phrasing, `score` what the answer is worth beside others (0 to 1)."""

    id: str
    prompt: str
    answer: str
    phrasing: str
    seen: bool
    weight: float
    tags: tuple[str, ...]
    trace_id: str
    reference: str | None
    history: tuple[Mapping[str, str], ...] = ()
    score: float = 1.0

    @property
    def same(self) -> str:
        """Equal for rows that differ by case, space and punctuation only."""
        return same_prompt([*(said["content"] for said in self.history), self.prompt])


@dataclass(frozen=True)
class Split:
    """The rows of each part, in the order they were given."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    held_out: tuple[Row, ...]


def split(rows: Sequence[Row], spec: SplitSpec) -> Split:
    """Divide rows whose normalised prompts all differ.

    Held-out rows are of two kinds: whole phrasings that no other part has, and single rows whose
    phrasing a training row has. Where too few phrasings repeat for the second kind, more whole
    phrasings take its place. Counts follow the asked shares to within one phrasing.

    A score moves no row, so that figures of other scores compare. Rows of score 0 are then left out
    of train: where they were all that a phrasing had there, its held-out rows are unseen ones,
    though a validation row may have it.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.phrasing, []).append(row)
    wanted = max(1, round(spec.held_out * len(rows)))
    order = sorted(groups, key=lambda name: _hash(spec.seed, "phrasing", name))
    unseen = _whole_phrasings(order, groups, round(spec.unseen_phrasings * wanted))
    held = {row.id for name in unseen for row in groups[name]}
    left = {name: len(groups[name]) for name in order if name not in unseen}
    others = [row for row in rows if row.phrasing in left]
    seen = _seen_rows(others, left, wanted - len(held), spec.seed)
    pinned = {row.phrasing for row in seen}
    held |= {row.id for row in seen}
    more = _whole_phrasings([n for n in left if n not in pinned], groups, wanted - len(held))
    held |= {row.id for name in more for row in groups[name]}
    others = [row for row in others if row.id not in held]
    chosen = max(1, round(spec.validation * len(rows)))
    validation = _validation_ids(others, left, pinned, chosen, spec.seed)
    train = [row for row in others if row.id not in validation and row.score]
    return _marked(rows, {row.id for row in train}, validation, held)


def _hash(seed: int, kind: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{kind}\0{name}".encode()).digest()


def _whole_phrasings(
    order: Iterable[str], groups: Mapping[str, Sequence[Row]], want: int
) -> set[str]:
    """Phrasings in order until `want` rows are covered; one that overshoots by more than it adds
    is passed over."""
    taken: set[str] = set()
    for name in order:
        size = len(groups[name])
        if size <= 2 * want:
            taken.add(name)
            want -= size
        if want <= 0:
            break
    return taken


def _seen_rows(rows: Iterable[Row], left: dict[str, int], want: int, seed: int) -> list[Row]:
    """Rows to hold out one by one; each phrasing keeps a row to learn from. Lowers `left`."""
    taken: list[Row] = []
    for row in sorted(rows, key=lambda row: _hash(seed, "held-out", row.id)):
        if len(taken) >= want:
            break
        if left[row.phrasing] > 1:
            left[row.phrasing] -= 1
            taken.append(row)
    return taken


def _validation_ids(
    rows: Sequence[Row], left: dict[str, int], pinned: set[str], want: int, seed: int
) -> set[str]:
    """IDs for validation; a phrasing with rows held out one by one keeps one to learn from."""
    taken: set[str] = set()
    for row in sorted(rows, key=lambda row: _hash(seed, "validation", row.id)):
        if len(taken) >= want:
            break
        if left[row.phrasing] > 1 or row.phrasing not in pinned:
            left[row.phrasing] -= 1
            taken.add(row.id)
    return taken


def _marked(rows: Sequence[Row], train: set[str], validation: set[str], held: set[str]) -> Split:
    learnt = {row.phrasing for row in rows if row.id in train}
    marked = [replace(row, seen=row.phrasing in learnt) for row in rows]
    parts = Split(
        *(tuple(row for row in marked if row.id in ids) for ids in (train, validation, held))
    )
    elsewhere = {row.same for row in (*parts.train, *parts.validation)}
    leaked = [row.id for row in parts.held_out if row.same in elsewhere]
    assert not leaked, f"held-out prompts that training or validation also has: {leaked}"
    return parts
