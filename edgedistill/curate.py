"""From traces to a dataset: what is not good enough is rejected with its reason, the rest is split.

The split is by prompt and by phrasing, decided by hashes of the seed with a prompt's ID or its
phrasing: changing one prompt moves as few others as it can.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    PARTS,
    Dataset,
    Finished,
    Identity,
    TokenMixEntry,
    Traces,
    dataset_digest,
    run_stage,
)
from edgedistill.checks import Checker, check_identity, clean_answer, make_checker
from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.progress import Progress
from edgedistill.recipe import Check, CurateSpec, SplitSpec, SqlExecutionCheck
from edgedistill.tokenmix import TokenMix, normalised, phrasing

VERSION = 2
FEW = 20  # prompts in a part; with 20, one of them is 5 points
USED = ("trace_id", "prompt_id", "text", "finish_reason", "failure")
# What a teacher itself says of an answer that is none.
CUT_OFF = ("refusal", "content_filter")
REASONS = (
    "failed",
    "empty",
    "truncated",
    "refused",
    "duplicate",
    "too-long",
    "invalid",
    "contradicted",
)


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
        return normalised("\n".join([*(said["content"] for said in self.history), self.prompt]))


@dataclass(frozen=True)
class Rejected:
    """One prompt that is not used, and why: `reason` is one of REASONS."""

    id: str
    prompt: str
    answer: str
    reason: str
    detail: str
    trace_id: str | None


@dataclass(frozen=True)
class Split:
    """The rows of each part, in the order they were given."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    held_out: tuple[Row, ...]


def curate(
    traces: Traces,
    mix: TokenMix,
    spec: CurateSpec,
    check: Check,
    out: Path,
    progress: Progress,
) -> Dataset:
    """Stage "curate": train, validation, held_out and rejected, one JSON object a line each.

    Raises:
        DatasetError: a part would be empty; says how many were rejected for which reasons.
        ArtifactError: the traces cannot be read.
        StorageError: no space or no permission.
    """
    identity = Identity(
        stage="curate",
        version=VERSION,
        spec={"curate": spec.model_dump(mode="json"), "check": check_identity(check)},
        inputs={"traces": traces.digest, "prompts": mix.digest},
        tools={"sqlite": sqlite3.sqlite_version} if isinstance(check, SqlExecutionCheck) else {},
    )

    def work(folder: Path) -> dict[str, Any]:
        rows, rejected = select(read_traces(traces.file), mix, spec, make_checker(check), progress)
        parts = split(rows, spec.split)
        _must_not_be_empty(parts, rejected, traces.file)
        for name in PARTS:
            _write_lines(folder / f"{name}.jsonl", getattr(parts, name))
        _write_lines(folder / "rejected.jsonl", rejected)
        for note in (_counts(parts, rejected), *_deviations(parts, spec.split)):
            progress.note(note)
        return _facts(parts, rejected)

    return _dataset(run_stage(identity, out, progress, work))


def _counts(parts: Split, rejected: Sequence[Rejected]) -> str:
    """The size of each part, and what so few prompts cannot show."""
    told = (
        f"{len(parts.train)} prompts to train on, {len(parts.validation)} to choose by, "
        f"{len(parts.held_out)} to measure with; {len(rejected)} answers rejected"
    )
    few = min(len(parts.validation), len(parts.held_out)) < FEW
    return f"{told}. Below {FEW}, figures are little more than chance" if few else told


def _dataset(done: Finished) -> Dataset:
    facts = done.facts
    return Dataset(
        folder=done.folder,
        digest=dataset_digest(done),
        train=facts["train"],
        validation=facts["validation"],
        held_out=facts["held_out"],
        rejected=facts["rejected"],
    )


def read_traces(file: Path) -> dict[str, Mapping[str, Any]]:
    """The traces of a `traces.jsonl` by prompt ID.

    Raises:
        ArtifactError: not readable, or not what collect writes.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            traces = [{name: trace[name] for name in USED} for trace in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the traces cannot be read: {error!r}",
            where=str(file),
            hint="delete its folder; the next build makes it again from the trace database",
        ) from error
    return {trace["prompt_id"]: trace for trace in traces}


def select(
    traces: Mapping[str, Mapping[str, Any]],
    mix: TokenMix,
    spec: CurateSpec,
    checker: Checker,
    progress: Progress,
) -> tuple[list[Row], list[Rejected]]:
    """Usable rows and rejected ones, both in the order of the token mix. Of prompts that are the
    same when normalised, the first usable one is kept."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    kept: dict[str, str] = {}
    with progress.task("curating", len(mix.entries), "prompts") as task:
        for entry in mix.entries:
            trace = traces.get(entry.id)
            answer = clean_answer(trace["text"] or "", spec) if trace else ""
            key = normalised("\n".join(said["content"] for said in entry.messages))
            why = _unusable(trace, answer, spec) or _repeated(kept.get(key))
            why = why or _invalid(answer, checker)
            score = 1.0 if why else _score(entry, answer, checker, spec)
            why = why or (None if score else ("contradicted", "it is not the prompt's reference"))
            if why is None and trace is not None:
                kept[key] = entry.id
                rows.append(_row(entry, answer, trace["trace_id"], score))
            elif why is not None:
                trace_id = trace["trace_id"] if trace else None
                text = trace["text"] or "" if trace else ""
                rejected.append(Rejected(entry.id, entry.prompt, text, *why, trace_id))
            task.advance()
    return rows, rejected


def _score(entry: TokenMixEntry, answer: str, checker: Checker, spec: CurateSpec) -> float:
    contradicted = entry.reference is not None and not checker.same(answer, entry.reference)
    return spec.contradicted_score if contradicted else 1.0


def _row(entry: TokenMixEntry, answer: str, trace_id: str, score: float) -> Row:
    return Row(
        id=entry.id,
        prompt=entry.prompt,
        answer=answer,
        phrasing=phrasing(entry),
        seen=False,
        weight=entry.weight,
        tags=entry.tags,
        trace_id=trace_id,
        reference=entry.reference,
        history=entry.messages[:-1],
        score=score,
    )


def _unusable(
    trace: Mapping[str, Any] | None, answer: str, spec: CurateSpec
) -> tuple[str, str] | None:
    if trace is None:
        return "failed", "there is no trace of this prompt"
    if trace["failure"] is not None:
        return "failed", str(trace["failure"])
    if trace["finish_reason"] == "length":
        return "truncated", "the answer ends at the teacher's max_tokens"
    if trace["finish_reason"] in CUT_OFF:
        return "refused", f"the teacher's finish_reason is {trace['finish_reason']}"
    if not answer:
        return "empty", "nothing is left of the answer once it is cleaned"
    plain = _plain(answer)
    refusal = next((start for start in spec.refusals if plain.startswith(_plain(start))), None)
    if refusal is not None:
        return "refused", f"starts with {refusal!r}"
    if len(answer) > spec.max_answer_chars:
        return "too-long", f"{len(answer)} characters; {spec.max_answer_chars} are allowed"
    return None


def _plain(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()


def _repeated(first: str | None) -> tuple[str, str] | None:
    return None if first is None else ("duplicate", f"same prompt as {first}")


def _invalid(answer: str, checker: Checker) -> tuple[str, str] | None:
    error = checker.invalid(answer)
    return None if error is None else ("invalid", error)


def split(rows: Sequence[Row], spec: SplitSpec) -> Split:
    """Divide rows whose normalised prompts all differ.

    Held-out rows are of two kinds: whole phrasings that no other part has, and single rows whose
    phrasing a training row has. Where too few phrasings repeat for the second kind, more whole
    phrasings take its place. Counts follow the asked shares to within one phrasing.
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
    train = [row for row in others if row.id not in validation]
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


def _must_not_be_empty(parts: Split, rejected: Sequence[Rejected], file: Path) -> None:
    empty = [name.replace("_", "-") for name in PARTS if not getattr(parts, name)]
    if not empty:
        return
    usable = sum(len(getattr(parts, name)) for name in PARTS)
    reasons = ", ".join(f"{n} {reason}" for reason, n in _by_reason(rejected).items() if n)
    rejects = f"; {len(rejected)} rejected ({reasons})" if rejected else ""
    shown = "".join(f"\n  {row.id}: {row.reason}: {row.detail}" for row in rejected[:3])
    raise DatasetError(
        f"no {' and no '.join(empty)} prompt is left: {usable} of {usable + len(rejected)} prompts "
        f"are usable{rejects}{shown}",
        where=str(file),
        hint="add prompts, ask a better teacher, or loosen `curate` in the recipe",
    )


def _by_reason(rejected: Iterable[Rejected]) -> dict[str, int]:
    counts = Counter(row.reason for row in rejected)
    return {reason: counts[reason] for reason in REASONS}


def _deviations(parts: Split, spec: SplitSpec) -> list[str]:
    seen = sum(row.seen for row in parts.held_out)
    wanted = round((1 - spec.unseen_phrasings) * len(parts.held_out))
    if wanted and not seen:
        return ["no phrasing repeats enough: all held-out prompts have one that training has not"]
    if wanted < len(parts.held_out) == seen:
        return ["too few phrasings: all held-out prompts have one that training also has"]
    return []


def _facts(parts: Split, rejected: Sequence[Rejected]) -> dict[str, Any]:
    seen = sum(row.seen for row in parts.held_out)
    return {
        "train": len(parts.train),
        "validation": len(parts.validation),
        "held_out": len(parts.held_out),
        "rejected": len(rejected),
        "rejected_by_reason": _by_reason(rejected),
        "held_out_seen": seen,
        "held_out_unseen": len(parts.held_out) - seen,
        "phrasings": {name: len({row.phrasing for row in getattr(parts, name)}) for name in PARTS},
    }


def _write_lines(path: Path, rows: Iterable[Row | Rejected]) -> None:
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode())
