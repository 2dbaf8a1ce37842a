"""Agreement with the teacher on held-out prompts, with bootstrap intervals, and the examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill.artifacts import write_json
from edgedistill.bench.models import Model
from edgedistill.checks import Checker
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress
from edgedistill.results import Agreement, Example, Interval

Answers = Mapping[str, str]  # row ID -> answer
Same = Mapping[str, bool]  # row ID -> the check says it equals the teacher's


def answer_all(
    models: Sequence[Model], rows: Sequence[EvalRow], resume: Path, progress: Progress
) -> dict[str, Answers]:
    """Each model's answers to all rows, one model in memory at a time.

    What a model answered is kept in `resume/answers-<model>.json`, so a killed run goes on behind
    the last complete model.
    """
    answers: dict[str, Answers] = {}
    for model in models:
        kept = resume / f"answers-{model.name}.json"
        if not kept.is_file():
            with (
                progress.task(f"answers of {model.name}", len(rows), "prompts") as task,
                model.open() as runs,
            ):
                made = runs.answer(rows, task)
            write_json(kept, {row.id: text for row, text in zip(rows, made, strict=True)})
        answers[model.name] = json.loads(kept.read_text("utf-8"))
    return answers


def judge(checker: Checker, rows: Sequence[EvalRow], answers: Answers) -> dict[str, bool]:
    """Which of the answers the check calls the same as the teacher's."""
    return {row.id: checker.same(answers[row.id], row.answer) for row in rows}


def agreement(
    model: str, rows: Sequence[EvalRow], same: Same, resamples: int, seed: int
) -> Agreement:
    """Agreement over all rows, and apart for seen and unseen phrasing (None without such rows)."""
    flags = {kind: [same[r.id] for r in rows if r.seen is kind] for kind in (True, False)}
    parts = {
        kind: bootstrap(part, resamples, seed) if part else None for kind, part in flags.items()
    }
    overall = bootstrap([same[row.id] for row in rows], resamples, seed)
    return Agreement(model, overall, seen=parts[True], unseen=parts[False])


def bootstrap(flags: Sequence[bool], resamples: int, seed: int) -> Interval:
    """Share of true flags with its 95 % percentile bootstrap interval over prompts.

    Efron 1979. Drawing n flags with replacement and counting the true ones is a binomial draw.
    """
    n = len(flags)
    share = sum(flags) / n
    draws = np.random.default_rng(seed).binomial(n, share, size=resamples) / n
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(share, float(low), float(high), n)


def examples(rows: Sequence[EvalRow], answers: Answers, same: Same, count: int) -> list[Example]:
    """Held-out examples side by side: disagreements first, then agreements, each with seen and
    unseen phrasing in turn. Disagreements fill at most half while there are agreements to show."""
    wrong = _mixed(row for row in rows if not same[row.id])
    right = _mixed(row for row in rows if same[row.id])
    first = min(len(wrong), max(count // 2, count - len(right)))
    shown = [*wrong[:first], *right[: count - first]]
    return [
        Example(row.id, row.prompt, row.answer, answers[row.id], same[row.id], row.seen)
        for row in shown
    ]


def _mixed(rows: Iterable[EvalRow]) -> list[EvalRow]:
    """Seen and unseen phrasing in turn, each in an order that only the IDs decide."""
    ordered = sorted(rows, key=lambda row: shuffled(row.id, 0))
    place: dict[bool, int] = {True: 0, False: 0}
    ranked = []
    for row in ordered:
        ranked.append((place[row.seen], row.seen, row))
        place[row.seen] += 1
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])]


def shuffled(row_id: str, seed: int) -> str:
    """A sort key that shuffles rows by ID alone: one row more or less moves no other."""
    return hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()
