"""Targets from the log-probabilities that the teacher's traces keep: what the student is to find
likely at each token of the answers it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.alignment import Aligned, align
from edgedistill.checks.cleaning import answer_source, clean_answer
from edgedistill.errors import ArtifactError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import CurateSpec
from edgedistill.spelling import Said, Step, spell
from edgedistill.targets import Coverage, TargetsWriter
from edgedistill.teacher.logprobs import read_said

NO_TRACE = "there is no trace of the prompt"
NO_LOGPROBS = "its trace has no log-probabilities (teacher.sampling.top_logprobs)"
CHANGED = "its answer is not the cleaned answer of its trace"
NOT_PLACED = "the tokens of its trace are not those of its answer"


def teacher_targets(
    rows: Sequence[EvalRow],
    traces: Path,
    prompt: StudentPrompt,
    cleaning: CurateSpec,
    k: int,
    into: Path,
    progress: Progress,
) -> Coverage:
    """Write the targets (targets.Targets) of `rows`, in the order of their traces, to `into`.

    A row's targets are those of `prompt.answer_ids(row.answer)`. `cleaning` is what made the
    answers of the traces' texts. `traces` (traces.jsonl) is read a line at a time. A row without
    targets is written, too, with nothing known; returns how much is.

    Raises:
        ArtifactError: the traces cannot be read.
        WeightsError: the student's tokens have no known bytes.
        StorageError: through run_stage, no space or no permission.
    """
    vocabulary = prompt.vocabulary()
    waiting = {row.id: row for row in rows}
    with (
        TargetsWriter(into, k) as writer,
        progress.task("aligning the teacher's log-probabilities", len(rows), "rows") as task,
    ):
        for trace in _lines(traces):
            row = waiting.pop(trace["prompt_id"], None)
            if row is None:
                continue
            steps, why = _steps(row, trace, cleaning, traces)
            answer = row.answer.encode("utf-8")
            aligned = align(prompt.answer_ids(row.answer), answer, steps, vocabulary, k)
            writer.add(row.id, aligned, mean_logprob(steps, len(answer)), why=why)
            task.advance()
        for row in waiting.values():
            nothing = Aligned.unknown(len(prompt.answer_ids(row.answer)), k)
            writer.add(row.id, nothing, why=NO_TRACE)
            task.advance()
    return writer.coverage


def mean_logprob(steps: Sequence[Step], length: int) -> float:
    """Mean log-probability, in nats a token, of the tokens that spell an answer of `length` bytes,
    its end included where it was told; NaN where steps are missing."""
    at = 0
    for step in steps:
        if step.start != at:
            return math.nan
        at = step.stop
    if at != length or not steps:
        return math.nan
    return sum(step.logprob for step in steps) / len(steps)


def _lines(traces: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with traces.open(encoding="utf-8") as lines:
            for line in lines:
                trace = json.loads(line)
                trace["prompt_id"], trace["text"], trace["top_logprobs"], trace["parameters"]
                yield trace
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(traces, error) from error


def _steps(
    row: EvalRow, trace: Mapping[str, Any], cleaning: CurateSpec, traces: Path
) -> tuple[list[Step], str | None]:
    """How the teacher spelled the row's answer, and why that is not known."""
    said = _said(trace, traces)
    if not said:
        return [], NO_LOGPROBS
    if clean_answer(trace["text"], cleaning) != row.answer:
        return [], CHANGED
    steps = spell(said, answer_source(trace["text"], cleaning))
    return steps, None if steps else NOT_PLACED


def _said(trace: Mapping[str, Any], traces: Path) -> list[Said]:
    if "logprobs" not in trace["parameters"]:  # what came unasked may be in another form
        return []
    try:
        return read_said(trace["top_logprobs"] or ())
    except (ValueError, TypeError) as error:
        raise _unreadable(traces, error) from error


def _unreadable(traces: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"the traces cannot be read: {error!r}",
        where=str(traces),
        hint="delete its folder; the next build makes it again from the trace database",
    )
