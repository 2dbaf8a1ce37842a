"""Pairs of a teacher's answer and a model's own, with what DPO compares them to: how likely the
model finds both before it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgedistill.distill.answers import asked, log_likelihoods
from edgedistill.distill.lesson import Job
from edgedistill.distill.pairs import Preference, read_pairs, write_pairs
from edgedistill.errors import TrainingError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.training.data import training_rows

GROUP = 64  # pairs between two looks of the bar


def usable(row: EvalRow, answer: str, shown: StudentPrompt, max_length: int) -> bool:
    """Whether an answer of the model itself can be put to it as one: it is not empty, ends where it
    ends, and fits."""
    try:
        training_rows([replace(row, answer=answer)], shown, max_length)
    except TrainingError:
        return False
    return True


def write_with_reference(
    job: Job, pairs: Sequence[Preference], file: Path, progress: Progress
) -> None:
    """Write `pairs` to `file`, those with a worse answer with the log-likelihoods that the model
    which the job begins with gives to both."""
    if not pairs:
        write_pairs(file, pairs)
        return
    drafts = file.with_suffix(".draft")
    write_pairs(drafts, pairs)
    told = list(read_pairs(drafts, job.shown(), job.spec.max_length))
    drafts.unlink()
    both = [at for at, pair in enumerate(told) if pair.rejected is not None]
    made = list(pairs)
    if both:
        with (
            asked(job) as learner,
            progress.task(f"{job.label}: likelihoods before it", len(both), "pairs") as task,
        ):
            for start in range(0, len(both), GROUP):
                group = both[start : start + GROUP]
                rows = [each for at in group for each in (told[at].chosen, told[at].rejected)]
                found = log_likelihoods(learner, [r for r in rows if r], job.spec.precision)
                for at, chosen, rejected in zip(group, found[::2], found[1::2], strict=True):
                    made[at] = replace(made[at], reference=(chosen, rejected))
                task.advance(len(group))
    write_pairs(file, made)
