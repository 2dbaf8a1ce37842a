"""The prompts that a sitting asks: of a file, or the held-out ones of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.collect import collect
from edgedistill.curate import curate, read_refused
from edgedistill.fidelity import EvalRow, read_rows, shuffled
from edgedistill.progress import Progress
from edgedistill.recipe import CurateSpec, Recipe
from edgedistill.tokenmix import TokenMix, read_token_mix
from edgedistill.workspace import locked

REFUSED_AT_MOST = 100  # prompts that the teacher refuses, asked beside the others


@dataclass(frozen=True)
class Prompts:
    """What is asked; `digest` is over all of it. A row's `answer` is the teacher's, "" where none
    is known. `dataset` is the digest of that whose held-out prompts these are, all of them. `tags`
    go by prompt ID; `refusals` are how refusals start. `refused` are prompts that the teacher
    refuses, with what it says: each is asked once, and not timed."""

    source: str
    digest: str
    rows: Sequence[EvalRow]
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    refusals: Sequence[str] = CurateSpec().refusals
    refused: Sequence[EvalRow] = ()
    dataset: str | None = None


def prompts_of(file: Path, sample: int | None) -> Prompts:
    """The prompts of a file, or so many of them.

    Raises:
        TokenMixError: they cannot be read.
    """
    mix = read_token_mix(file, sample, "--prompts names it, relative to the folder you are in")
    return Prompts(file.name, mix.digest, [_row(each, "") for each in mix.entries], _tags(mix))


def _row(entry: TokenMixEntry, answer: str) -> EvalRow:
    return EvalRow(
        id=entry.id,
        prompt=entry.prompt,
        answer=answer,
        phrasing="",
        seen=False,
        reference=entry.reference,
        history=entry.messages[:-1],
    )


def _tags(mix: TokenMix) -> dict[str, Sequence[str]]:
    return {entry.id: entry.tags for entry in mix.entries if entry.tags}


def held_out_of(recipe: Recipe, sample: int | None, root: Path, progress: Progress) -> Prompts:
    """A recipe's held-out prompts, or so many of them: on prompts that a student has learnt it
    looks better than it is. What the workspace `root` lacks of the teacher's answers is asked.

    Raises:
        TeacherError: that fails. DatasetError: too few answers are left.
    """
    with locked(root):
        mix = read_token_mix(recipe.prompts, recipe.sample)
        traces = collect(mix, recipe.teacher, recipe.collect, root, progress)
        dataset = curate(traces, mix, recipe.curate, recipe.check, root, progress)
    rows = _drawn(read_rows(dataset.folder / "held_out.jsonl"), sample)
    said = read_refused(dataset.folder / "rejected.jsonl")
    refused = [_row(each, said[each.id]) for each in mix.entries if each.id in said]
    return Prompts(
        source=f"held-out prompts of {recipe.name}",
        digest=digest_of([asdict(row) for row in rows]),
        rows=rows,
        dataset=dataset.digest if sample is None else None,
        tags=_tags(mix),
        refusals=recipe.curate.refusals,
        refused=_drawn(refused, min(REFUSED_AT_MOST, sample or REFUSED_AT_MOST)),
    )


def _drawn(rows: Sequence[EvalRow], sample: int | None) -> Sequence[EvalRow]:
    """So many of them, in their order; which, the IDs alone decide."""
    if sample is None:
        return rows
    chosen = {row.id for row in sorted(rows, key=lambda row: shuffled(row.id, 0))[:sample]}
    return [row for row in rows if row.id in chosen]


def mix_facts(prompts: Prompts | None) -> dict[str, Any] | None:
    """What was asked, as a result has it."""
    if prompts is None:
        return None
    return {
        "source": prompts.source, "digest": prompts.digest, "prompts": len(prompts.rows),
        "dataset": prompts.dataset,
    }  # fmt: skip
