"""HumanEval: functions that a model writes, run on the tests that belong to them, in a sandbox.

The format, the texts an answer ends at, and pass@k: Chen et al. 2021, "Evaluating Large Language
Models Trained on Code" (arXiv 2107.03374).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import digest_of, digest_of_file
from edgedistill.errors import DatasetError, Problem, listed
from edgedistill.evaluate.asking import Asking
from edgedistill.evaluate.evaluation import Score, TaskResult
from edgedistill.progress import Progress
from edgedistill.sandbox import Limits, Verdict, run_tests

PREFIX = "humaneval:"
FIELDS = ("task_id", "prompt", "entry_point", "test")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
FENCE = "```"
MAX_TOKENS = 1024
KS = (1, 10, 100)
# How lm-eval's humaneval_instruct asks a chat model, and what it begins the answer with.
ASKED = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```\n"
)
BEGUN = "Here is the completed function:\n```python\n{prompt}\n"


@dataclass(frozen=True)
class Exercise:
    """A function to write: its head and docstring, its name, and a test that defines `check`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


def read_exercises(file: Path) -> list[Exercise]:
    """The exercises of a JSONL file of HumanEval's format.

    Raises:
        DatasetError: it is not there, or lines of it are broken.
    """
    rows = _rows(file, FIELDS, "an exercise of HumanEval's format")
    exercises = [Exercise(*(row[name] for name in FIELDS)) for row in rows]
    _once(file, [each.task_id for each in exercises])
    return exercises


def read_completions(file: Path) -> dict[str, list[str]]:
    """Completions that a model has written, by task_id; several of one exercise are samples.

    Raises:
        DatasetError: it is not there, or lines of it are broken.
    """
    found: dict[str, list[str]] = {}
    for row in _rows(file, ("task_id", "completion"), "a completion"):
        found.setdefault(row["task_id"], []).append(row["completion"])
    return found


def _rows(file: Path, fields: Sequence[str], what: str) -> list[dict[str, str]]:
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"it cannot be read: {error}", where=str(file)) from error
    rows, problems = list[dict[str, str]](), list[Problem]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [name for name in fields if not isinstance(row.get(name), str)]
        except (ValueError, AttributeError) as error:
            problems.append(Problem(str(file), number, "", f"this is no JSON object: {error}"))
            continue
        if missing:
            problems.append(Problem(str(file), number, "", f"it has no text {', '.join(missing)}"))
        rows.append(row)
    if problems:
        raise DatasetError(f"{len(problems)} lines are not {what}:{listed(problems)}")
    if not rows:
        raise DatasetError(f"it has no line that is {what}", where=str(file))
    return rows


def _once(file: Path, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"{twice[0]} stands in it {len(names)} times", where=str(file))


def written(
    exercises: Sequence[Exercise], asking: Asking, chat: bool, system: str | None
) -> dict[str, list[str]]:
    """The model's greedy completion of each exercise."""
    found = {}
    with asking.progress.task("writing functions", len(exercises), "functions") as task:
        for exercise in exercises:
            text, stops = _asked(exercise, asking, chat, system)
            found[exercise.task_id] = [asking.answer(text, MAX_TOKENS, stops)]
            task.advance()
    return found


def _asked(
    exercise: Exercise, asking: Asking, chat: bool, system: str | None
) -> tuple[str, Sequence[str]]:
    if not chat:
        return exercise.prompt, STOPS
    messages = [] if system is None else [{"role": "system", "content": system}]
    asked = ASKED.replace("{prompt}", exercise.prompt)
    begun = BEGUN.replace("{prompt}", exercise.prompt)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]
    return asking.model.render(messages), (*STOPS, FENCE)


def score_code(
    name: str,
    file: Path,
    exercises: Sequence[Exercise],
    completions: Mapping[str, Sequence[str]],
    limits: Limits,
    progress: Progress,
) -> tuple[TaskResult, list[Verdict]]:
    """Run every completion on its exercise's tests.

    Raises:
        DatasetError: an exercise has no completion, or there are completions of others.
    """
    lacking = [each.task_id for each in exercises if not completions.get(each.task_id)]
    if lacking:
        raise DatasetError(
            f"{len(lacking)} exercises have no completion, the first is {lacking[0]}",
            hint="--limit N takes the first N exercises of the file",
        )
    verdicts: list[list[Verdict]] = []
    total = sum(len(completions[each.task_id]) for each in exercises)
    with progress.task("running their tests", total, "programs") as task:
        for each in exercises:
            verdicts.append([])
            for completion in completions[each.task_id]:
                check = f"{each.test}\ncheck({each.entry_point})\n"
                verdicts[-1].append(run_tests(each.prompt + completion, check, limits))
                task.advance()
    rows = [_row(*each) for each in zip(exercises, verdicts, strict=True)]
    metrics = [
        name for name in rows[0] if all(name.startswith("pass@") and name in r for r in rows)
    ]
    result = TaskResult(
        name=name,
        version="1",
        config=digest_of([digest_of_file(file), STOPS, MAX_TOKENS]),
        num_fewshot=0,
        rows=rows,
        scores={metric: _score([row[metric] for row in rows]) for metric in metrics},
    )
    return result, [verdict for some in verdicts for verdict in some]


def _row(exercise: Exercise, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    samples, passed = len(verdicts), sum(verdict.passed for verdict in verdicts)
    shares = {f"pass@{k}": pass_at_k(samples, passed, k) for k in KS if k <= samples}
    failed = [verdict.why for verdict in verdicts if not verdict.passed][:3]
    document = digest_of([exercise.task_id, exercise.prompt, exercise.test])[:16]
    return {"document": document, "id": exercise.task_id, **shares, "failed": failed}


def _score(values: Sequence[float]) -> Score:
    n = len(values)
    return Score(
        statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """How likely one of k samples passes, when `passed` of `samples` do: the unbiased estimate
    1 - C(samples - passed, k) / C(samples, k) (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
