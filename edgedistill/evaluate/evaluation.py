"""What `edgedistill evaluate` found, in a file that is read again beside others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import digest_of, write_json
from edgedistill.kept_file import Kept

KIND, VERSION = "edgedistill-evaluation", 1
PARTS = ("made", "edgedistill", "model", "device", "settings", "tasks")
HINT = "evaluations are made by `edgedistill evaluate MODEL --out FILE`"
EVALUATION = Kept(KIND, VERSION, "evaluation", PARTS, HINT)
TASK_PARTS = ("name", "config", "rows", "scores")


@dataclass(frozen=True)
class Score:
    """A metric of a task over its documents; `stderr` is None where it is not known."""

    value: float
    stderr: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResult:
    """`config` is a digest of all that shapes the task, its local data included. `rows` has of each
    document its hash (`document`) and what every metric says of it. A group has `members` and no
    rows of its own. `scores` are in the task's own order."""

    name: str
    version: str
    config: str
    num_fewshot: int
    rows: list[dict[str, Any]]
    scores: dict[str, Score]
    members: list[str] = field(default_factory=list)

    @property
    def documents(self) -> str:
        """A digest of what was asked, in order."""
        return digest_of([row["document"] for row in self.rows])

    def verdicts(self, metric: str) -> list[float] | None:
        """What a metric says of each document, where it says it of each."""
        if not self.rows or not all(metric in row for row in self.rows):
            return None
        return [float(row[metric]) for row in self.rows]


@dataclass(frozen=True)
class Evaluation:
    """`model`: name, file, sha256, bytes, types, parameters, runtime, bundle. Of completions that
    were made elsewhere bytes, parameters and runtime are None."""

    made: str  # UTC, ISO 8601
    edgedistill: str
    model: Mapping[str, Any]
    device: Mapping[str, Any]
    settings: Mapping[str, Any]
    tasks: Sequence[TaskResult]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    def task(self, name: str) -> TaskResult | None:
        return next((task for task in self.tasks if task.name == name), None)


def write_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Write it whole, or not at all."""
    write_json(file, evaluation.to_json())


def read_evaluation(file: Path) -> Evaluation:
    """Read it again.

    Raises:
        ArtifactError: it cannot be read, is cut off, is no evaluation, or is of a later version.
    """
    value = EVALUATION.read(file)
    known = {name: value[name] for name in Evaluation.__dataclass_fields__ if name in value}
    try:
        tasks = [_task(each) for each in value["tasks"]]
        return Evaluation(**{**known, "tasks": tasks})
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise EVALUATION.refused(file, f"it is damaged: {error!r}") from error


def _task(value: Mapping[str, Any]) -> TaskResult:
    if missing := [name for name in TASK_PARTS if name not in value]:
        raise ValueError(f"a task lacks {', '.join(missing)}")
    scores = {name: Score(**each) for name, each in value["scores"].items()}
    for name, score in scores.items():
        numbers = [score.value, *([] if score.stderr is None else [score.stderr])]
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise ValueError(f"{value['name']}: {name} is no number")
    if not all("document" in row for row in value["rows"]):
        raise ValueError(f"{value['name']}: a row has no document")
    known = {name: value[name] for name in TaskResult.__dataclass_fields__ if name in value}
    return TaskResult(**{**known, "scores": scores})
