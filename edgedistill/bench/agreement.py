"""Agreement with the teacher on held-out prompts, with bootstrap intervals, and the examples."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill.artifacts import write_json
from edgedistill.bench.models import Model
from edgedistill.checks import Checker, about
from edgedistill.fidelity import EvalRow, shuffled
from edgedistill.progress import Progress
from edgedistill.results import Agreement, Example, Interval

TAIL = 0.025
Answers = Mapping[str, str]  # row ID -> answer
Same = Mapping[str, bool]  # row ID -> the check says it equals the teacher's


def answer_all(
    models: Sequence[Model],
    rows: Sequence[EvalRow],
    followed: Mapping[str, Collection[str]],
    resume: Path,
    progress: Progress,
) -> dict[str, Answers]:
    """Each model's greedy answers to all rows, one model in memory at a time.

    `followed` holds, by model name, the IDs of rows whose answer is known to be the teacher's: its
    tokens were a draft that the model confirmed (speculative decoding, arXiv 2211.17192). What a
    model answered is kept in `resume/answers-<model>.json`, so a killed run goes on behind the last
    complete model.
    """
    answers: dict[str, Answers] = {}
    for model in models:
        kept = resume / f"answers-{model.name}.json"
        if not kept.is_file():
            write_json(kept, _answers(model, rows, followed.get(model.name, ()), progress))
        answers[model.name] = json.loads(kept.read_text("utf-8"))
    return answers


def _answers(
    model: Model, rows: Sequence[EvalRow], followed: Collection[str], progress: Progress
) -> dict[str, str]:
    found = {row.id: row.answer for row in rows if row.id in followed}
    asked = [row for row in rows if row.id not in followed]
    if asked:
        with (
            progress.task(f"answers of {model.name}", len(rows), "prompts") as task,
            model.open() as runs,
        ):
            task.advance(len(found))
            made = runs.answer(asked, task)
        found |= {row.id: text for row, text in zip(asked, made, strict=True)}
    return found


def judge(checker: Checker, rows: Sequence[EvalRow], answers: Answers) -> dict[str, bool]:
    """Which of the answers the check calls the same as the teacher's."""
    return {
        row.id: about(checker, row.prompt, row.history).same(answers[row.id], row.answer)
        for row in rows
    }


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
    Where all flags are alike so is every resample: there the interval is Clopper and Pearson's.
    """
    n = len(flags)
    share = sum(flags) / n
    if share in (0.0, 1.0):
        width = 1 - TAIL ** (1 / n)
        return Interval(share, 0.0, width, n) if share == 0 else Interval(share, 1 - width, 1.0, n)
    draws = np.random.default_rng(seed).binomial(n, share, size=resamples) / n
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
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
