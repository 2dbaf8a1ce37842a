"""From traces to a dataset: what is not good enough is rejected with its reason, the rest split."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from edgedistill.check_specs import Check, SqlExecutionCheck
from edgedistill.checks import Checker, about, check_identity, make_checker
from edgedistill.checks.cleaning import clean_answer
from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.progress import Progress
from edgedistill.recipe import CurateSpec, SplitSpec
from edgedistill.refusing import REFUSED_BY_API, refusal_start
from edgedistill.splitting import Row, Split, split
from edgedistill.tokenmix import TokenMix, phrasing, same_prompt

VERSION = 3
FEW = 20  # prompts in a part; with 20, one of them is 5 points
USED = ("trace_id", "prompt_id", "text", "finish_reason", "failure")
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
class Rejected:
    """One prompt that is not used, and why: `reason` is one of REASONS."""

    id: str
    prompt: str
    answer: str
    reason: str
    detail: str
    trace_id: str | None


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
        rejected += _contradicted(rows, parts)
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


def read_refused(file: Path) -> dict[str, str]:
    """Of a dataset's `rejected.jsonl` what the teacher said to prompts that it refuses, by ID."""
    with file.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    return {row["id"]: row["answer"] for row in rows if row["reason"] == "refused"}


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
    same when normalised, the first usable one is kept. Rows of score 0 are for `split` to keep from
    training alone: measured on prompts that the teacher gets right, any student looks better."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    kept: dict[str, str] = {}
    with progress.task("curating", len(mix.entries), "prompts") as task:
        for entry in mix.entries:
            trace = traces.get(entry.id)
            answer = clean_answer(trace["text"] or "", spec) if trace else ""
            key = same_prompt(said["content"] for said in entry.messages)
            why = _unusable(trace, answer, spec) or _repeated(kept.get(key))
            why = why or _invalid(answer, checker)
            if why is None and trace is not None:
                kept[key] = entry.id
                score = _score(entry, answer, checker, spec)
                rows.append(_row(entry, answer, trace["trace_id"], score))
            elif why is not None:
                trace_id = trace["trace_id"] if trace else None
                text = trace["text"] or "" if trace else ""
                rejected.append(Rejected(entry.id, entry.prompt, text, *why, trace_id))
            task.advance()
    return rows, rejected


def _contradicted(rows: Sequence[Row], parts: Split) -> list[Rejected]:
    """The rows that no part has, since they would count nothing in training."""
    used = {row.id for name in PARTS for row in getattr(parts, name)}
    why = ("contradicted", "it is not the prompt's reference")
    return [
        Rejected(row.id, row.prompt, row.answer, *why, row.trace_id)
        for row in rows
        if row.id not in used
    ]


def _score(entry: TokenMixEntry, answer: str, checker: Checker, spec: CurateSpec) -> float:
    if entry.reference is None:
        return 1.0
    check = about(checker, entry.prompt, entry.messages[:-1])
    return 1.0 if check.same(answer, entry.reference) else spec.contradicted_score


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
    if trace["finish_reason"] in REFUSED_BY_API:
        return "refused", f"the teacher's finish_reason is {trace['finish_reason']}"
    if not answer:
        return "empty", "nothing is left of the answer once it is cleaned"
    refusal = refusal_start(answer, spec.refusals)
    if refusal is not None:
        return "refused", f"starts with {refusal!r}"
    if len(answer) > spec.max_answer_chars:
        return "too-long", f"{len(answer)} characters; {spec.max_answer_chars} are allowed"
    return None


def _repeated(first: str | None) -> tuple[str, str] | None:
    return None if first is None else ("duplicate", f"same prompt as {first}")


def _invalid(answer: str, checker: Checker) -> tuple[str, str] | None:
    error = checker.invalid(answer)
    return None if error is None else ("invalid", error)


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
