"""The field's retention table: of each task the teacher's score, a student's, and what share of the
teacher's it has kept, beside how much smaller it is.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError, UsageError, did_you_mean
from edgedistill.evaluate.evaluation import Evaluation, Score, TaskResult, read_evaluation
from edgedistill.measures import NORMAL95
from edgedistill.names import size_label

RESAMPLES, BATCH, SEED = 10_000, 200, 0
PAIRED, PROPAGATED = "bootstrap over documents", "propagated standard errors"
CSV_HEADER = (
    "task", "metric", "teacher", "teacher_score", "teacher_stderr", "student", "student_score",
    "student_stderr", "retention", "low", "high", "interval", "parameter_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """Whom the students are held against: an evaluation, scores from elsewhere by task, or both."""

    name: str
    evaluation: Evaluation | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    parameters: float | None = None

    def tasks(self) -> list[str]:
        measured = [] if self.evaluation is None else [task.name for task in self.evaluation.tasks]
        return list(dict.fromkeys([*measured, *self.scores]))


@dataclass(frozen=True)
class Kept:
    """One student's part of a row. `retention` is student / teacher (teacher / student of a metric
    of which less is better), None where it cannot be told, with its 95 % interval where that is
    known, and how (`interval`)."""

    score: float
    stderr: float | None
    retention: float | None
    low: float | None
    high: float | None
    interval: str | None


@dataclass(frozen=True)
class Row:
    """A task: the teacher's score and each student's part; None of one that was not asked it."""

    task: str
    metric: str
    higher_is_better: bool
    score: float
    stderr: float | None
    students: list[Kept | None]


@dataclass(frozen=True)
class Student:
    """`ratio`: the teacher's parameters over the student's; None where one is not known."""

    name: str
    parameters: int | None
    ratio: float | None


@dataclass(frozen=True)
class Retention:
    """The table."""

    teacher: str
    teacher_parameters: float | None
    students: list[Student]
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score_given(text: str) -> tuple[str, Score]:
    """`TASK=SCORE` or `TASK=SCORE:STDERR`, of a teacher that was measured elsewhere.

    Raises:
        UsageError: it is neither.
    """
    name, equals, value = text.rpartition("=")
    score, colon, error = value.partition(":")
    try:
        numbers = [float(score), *([float(error)] if colon else [])]
    except ValueError:
        numbers = []
    if not name or not equals or not numbers or not all(map(math.isfinite, numbers)):
        raise UsageError(
            f"--teacher-score {text!r} is not read",
            hint="write TASK=SCORE or TASK=SCORE:STDERR, such as arc_easy=0.78:0.01",
        )
    return name, Score(numbers[0], numbers[1] if colon else None)


def retention(
    files: Sequence[Path],
    teacher: Path | None,
    given: Sequence[str] = (),
    parameters: float | None = None,
    name: str | None = None,
    metric: str | None = None,
) -> Retention:
    """The table of these students. Without `metric` a task's first one is taken.

    Raises:
        ArtifactError: a file is no evaluation, or was asked other questions than the teacher.
        UsageError: no teacher, no task in common, or no such metric.
    """
    held = None if teacher is None else read_evaluation(teacher)
    if held is None and not given:
        raise UsageError("there is no teacher", hint="give --teacher FILE, or --teacher-score")
    scores = dict(map(score_given, given))
    known = parameters if parameters is not None or held is None else held.model["parameters"]
    called = name or (held.model["name"] if held is not None else "teacher")
    against = Teacher(called, held, scores, known)
    students = [(file, read_evaluation(file)) for file in files]
    rows = [row for task in against.tasks() if (row := _row(task, against, students, metric))]
    if not rows:
        raise UsageError("no student was asked a task of the teacher's", hint=_in_common(against))
    return Retention(
        teacher=against.name,
        teacher_parameters=against.parameters,
        students=[_student(each, against) for _, each in students],
        rows=rows,
        notes=[*_notes(rows, against), *_otherwise(against, [each for _, each in students])],
    )


def _in_common(teacher: Teacher) -> str:
    return f"the teacher's tasks are {', '.join(teacher.tasks())}"


def _student(evaluation: Evaluation, teacher: Teacher) -> Student:
    own = evaluation.model["parameters"]
    ratio = teacher.parameters / own if own and teacher.parameters else None
    return Student(str(evaluation.model["name"]), own, ratio)


def _row(
    task: str, teacher: Teacher, students: Sequence[tuple[Path, Evaluation]], metric: str | None
) -> Row | None:
    held = None if teacher.evaluation is None else teacher.evaluation.task(task)
    asked = [(file, found) for file, each in students if (found := each.task(task)) is not None]
    if not asked:
        return None
    chosen = _metric(held or asked[0][1], metric)
    base = teacher.scores.get(task)
    if base is None:
        assert held is not None  # a teacher's task is measured or given
        base = held.scores[chosen]
        for file, found in asked:
            _require_same(teacher, held, file, found)
    better = asked[0][1].scores[_metric(asked[0][1], metric)].higher_is_better
    kept = [
        None if (found := each.task(task)) is None else _kept(found, chosen, held, base, better)
        for _, each in students
    ]
    return Row(task, chosen, better, base.value, base.stderr, kept)


def _metric(task: TaskResult, metric: str | None) -> str:
    if metric is None:
        return next(iter(task.scores))
    if metric not in task.scores:
        guess = did_you_mean(metric, task.scores)
        listed = f"it has {', '.join(task.scores)}"
        raise UsageError(
            f"{task.name} has no metric {metric!r}",
            hint=f"{guess}\n  {listed}" if guess else listed,
        )
    return metric


def _require_same(teacher: Teacher, held: TaskResult, file: Path, found: TaskResult) -> None:
    """That both were asked the same questions in the same way."""
    differ = [
        f"{said} {ours}, and {theirs}"
        for said, ours, theirs in (
            ("task version", held.version, found.version),
            ("examples in a prompt", held.num_fewshot, found.num_fewshot),
            ("documents", len(held.rows), len(found.rows)),
            ("digest of the documents", held.documents[:12], found.documents[:12]),
            ("digest of the task", held.config[:12], found.config[:12]),
        )
        if ours != theirs
    ]
    if differ:
        raise ArtifactError(
            f"{held.name} was asked otherwise than of {teacher.name}: {'; '.join(differ)}",
            where=str(file),
            hint="evaluate both with the same task, --limit and --num-fewshot",
        )


def _kept(
    found: TaskResult, metric: str, held: TaskResult | None, base: Score, better: bool
) -> Kept:
    own = found.scores[_metric(found, metric)]
    top, bottom = (own, base) if better else (base, own)
    if bottom.value <= 0 or top.value < 0:
        return Kept(own.value, own.stderr, None, None, None, None)
    ratio = top.value / bottom.value
    ours = found.verdicts(metric)
    theirs = None if held is None or base is not held.scores.get(metric) else held.verdicts(metric)
    if _are_means(ours, own) and _are_means(theirs, base):
        assert ours is not None
        assert theirs is not None
        upper, lower = (ours, theirs) if better else (theirs, ours)
        low, high = _bootstrap(upper, lower)
        return Kept(own.value, own.stderr, ratio, low, high, PAIRED)
    if top.stderr is None or top.value == 0:
        return Kept(own.value, own.stderr, ratio, None, None, None)
    # The delta method on the logarithm: relative errors of independent scores add in squares.
    error = math.hypot(top.stderr / top.value, (bottom.stderr or 0.0) / bottom.value)
    spread = math.exp(NORMAL95 * error)
    return Kept(own.value, own.stderr, ratio, ratio / spread, ratio * spread, PROPAGATED)


def _are_means(verdicts: Sequence[float] | None, score: Score) -> bool:
    """A score that is no mean of its documents' (a perplexity, a BLEU) is not resampled so."""
    if not verdicts:
        return False
    return math.isclose(math.fsum(verdicts) / len(verdicts), score.value, rel_tol=1e-9)


def _bootstrap(upper: Sequence[float], lower: Sequence[float]) -> tuple[float | None, float | None]:
    """Of the ratio of means, over the documents that both were asked (Efron and Tibshirani 1993,
    section 6): a document that is hard for both does not widen it."""
    import numpy as np

    chance, n = np.random.default_rng(SEED), len(upper)
    above, below = np.array(upper), np.array(lower)
    ratios = []
    for _ in range(RESAMPLES // BATCH):
        drawn = chance.integers(0, n, (BATCH, n))
        ratios.append(np.divide(above[drawn].sum(1), below[drawn].sum(1) + 1e-300))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return (float(low), float(high)) if high < 1e6 else (None, None)


def _notes(rows: Sequence[Row], teacher: Teacher) -> list[str]:
    notes = []
    if teacher.scores:
        told = ", ".join(name for name in teacher.scores if any(r.task == name for r in rows))
        notes.append(f"the teacher's score is taken as given for {told}")
    exact = [name for name, score in teacher.scores.items() if score.stderr is None]
    if exact:
        notes.append(
            f"no standard error is given for {', '.join(exact)}: the interval is the student's"
        )
    unread = [name for name in teacher.scores if all(row.task != name for row in rows)]
    if unread:
        notes.append(f"no student was asked {', '.join(unread)}")
    if any(not row.higher_is_better for row in rows):
        notes.append("of a metric of which less is better retention is teacher / student")
    return notes


def _otherwise(teacher: Teacher, students: Sequence[Evaluation]) -> list[str]:
    """Who was asked otherwise than the teacher (or than the first student, where the teacher's
    scores are given): the chat template decides a score, and no digest of a task holds it."""
    named = [(str(each.model["name"]), each) for each in students]
    if teacher.evaluation is not None:
        named.insert(0, (teacher.name, teacher.evaluation))
    known = [(name, way) for name, each in named if (way := _way(each)) is not None]
    notes = []
    for name, way in known[1:]:
        base, its = known[0]
        differ = [f"{option} {its[option]}, and {way[option]}" for option in way
                  if way[option] != its[option]]  # fmt: skip
        if differ:
            notes.append(
                f"{name} was asked otherwise than {base}: {'; '.join(differ)}; scores differ by "
                "that, too"
            )
    return notes


def _way(evaluation: Evaluation) -> dict[str, str] | None:
    """By which options it was asked; None of completions from elsewhere, of which nobody knows."""
    if evaluation.model.get("runtime", "") is None:
        return None
    chat, system = evaluation.settings.get("chat"), evaluation.settings.get("system")
    return {"--chat": "yes" if chat else "no", "--system": repr(system) if system else "none"}


def headers(value: Mapping[str, Any]) -> list[str]:
    """Of the table's columns; a student's has its size and how many times smaller it is."""
    teacher = value["teacher"] + _size(value["teacher_parameters"])
    names = []
    for each in value["students"]:
        ratio = each["ratio"]
        smaller = f", {ratio:.3g} times smaller" if ratio else ""
        names.append(each["name"] + _size(each["parameters"], smaller))
    return ["task", "metric", teacher, *names]


def _size(parameters: float | None, more: str = "") -> str:
    return f" ({size_label(int(parameters))}{more})" if parameters else ""


def cells(row: Mapping[str, Any]) -> list[str]:
    """Of one row of the table."""
    return [
        row["task"],
        row["metric"],
        _score(row["score"], row["stderr"]),
        *("-" if each is None else _told(each) for each in row["students"]),
    ]


def _told(kept: Mapping[str, Any]) -> str:
    score = _score(kept["score"], kept["stderr"])
    if kept["retention"] is None:
        return f"{score}, retention not known"
    span = f" [{kept['low']:.0%}, {kept['high']:.0%}]" if kept["low"] is not None else ""
    return f"{score}, {kept['retention']:.0%}{span}"


def _score(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def markdown(value: Mapping[str, Any]) -> str:
    lines = [headers(value), ["---"] * len(headers(value)), *map(cells, value["rows"])]
    table = "\n".join("| " + " | ".join(_escaped(line)) + " |" for line in lines)
    legend = "Score ± standard error, then retention with its 95 % interval."
    return "\n\n".join([table, legend, *(f"Note: {note}." for note in value["notes"])])


def _escaped(line: Iterable[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in line]


def as_csv(value: Mapping[str, Any]) -> str:
    """One line for each task and student."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in value["rows"]:
        for student, kept in zip(value["students"], row["students"], strict=True):
            if kept is not None:
                writer.writerow([
                    row["task"], row["metric"], value["teacher"], row["score"], row["stderr"],
                    student["name"], kept["score"], kept["stderr"], kept["retention"],
                    kept["low"], kept["high"], kept["interval"], student["ratio"],
                ])  # fmt: skip
    return text.getvalue().rstrip("\n")
