"""What Trainer's log says of a run, and when it is over."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.results import Sample, TrainingPoint
from edgedistill.training.course import Course, Examined

EVALUATED = "evaluated"  # what was kept when validation agreement was measured, or a run left
COMPLETE = "complete"  # written last into a checkpoint: only then is it used again
AGREEMENT, NLL, KLD = "validation_agreement", "validation_nll", "validation_kld"
SAMPLES = "samples"
WINDOW = 8  # steps whose mean loss is looked at
FIRST, TIMES, NATS = 2, 2.0, 1.0  # steps; what is far more than their loss
# Standard errors that it may be above the first, at least the share, and at least the nats: where a
# run begins with what is learnt already, one hard row in a batch is many times the mean.
ERRORS, SHARE, LEAST = 4.0, 0.05, 0.25
Entry = dict[str, Any]


def last_complete(resume: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are removed."""
    found = []
    for folder in resume.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            found.append(folder)
        else:
            shutil.rmtree(folder)
    return max(found, key=step_of, default=None)


def last_kept(resume: Path) -> str:
    """Where the adapter of the last evaluation is, in words for an error; "" where there is
    none."""
    kept = [folder for folder in (resume / EVALUATED).glob("*") if folder.name.isdigit()]
    last = max(kept, key=lambda folder: int(folder.name), default=None)
    return "" if last is None else f"; the last adapter before that is {last}"


def step_of(checkpoint: Path) -> int:
    """The steps that were done when a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def history_of(checkpoint: Path | None) -> list[Entry]:
    """What was logged up to a checkpoint."""
    if checkpoint is None:
        return []
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return list(state["log_history"])


def entry(step: int, found: Examined) -> Entry:
    """An evaluation, for the log, so that checkpoints carry it."""
    samples = [asdict(sample) for sample in found.samples]
    shown = {SAMPLES: samples} if samples else {}
    return {"step": step, AGREEMENT: found.agreement, NLL: found.nll, KLD: found.kld, **shown}


def training_points(history: Sequence[Entry], per_epoch: int) -> list[TrainingPoint]:
    """Trainer's log as one point a step."""
    steps: dict[int, Entry] = {}
    for each in history:
        steps.setdefault(each["step"], {}).update(each)
    return [
        TrainingPoint(
            step=step,
            epoch=round(step / per_epoch, 6),
            loss=each.get("loss"),
            learning_rate=each.get("learning_rate"),
            validation_agreement=each.get(AGREEMENT),
            validation_nll=each.get(NLL),
            validation_kld=each.get(KLD),
            # Fields in their own order: a checkpoint's JSON sorts them.
            samples=[Sample(**sample) for sample in each.get(SAMPLES, ())],
        )
        for step, each in sorted(steps.items())
        if "loss" in each or AGREEMENT in each
    ]


def as_json(points: Sequence[TrainingPoint]) -> list[dict[str, Any]]:
    """What `training.json` holds."""
    return [asdict(point) for point in points]


def chosen(history: Sequence[Entry], course: Course) -> int:
    """The step whose weights would be the result if the run ended here."""
    return course.choose(training_points(history, course.batches_per_epoch))


def is_over(history: Sequence[Entry], course: Course) -> bool:
    """Whether there is no step to do."""
    if history and history[-1]["step"] == 0:  # judged, and not trained yet
        start = history[-1]
        return course.enough(Examined(start[AGREEMENT], start[NLL], start[KLD]))
    return gone_stale(history, course)


def gone_stale(history: Sequence[Entry], course: Course) -> bool:
    """Whether none of the last `patience` evaluations is the one that would be chosen.

    The start is left out: at the highest learning rate a model that lost little is worse than at
    its start, and at the end, when the rate has fallen, better.
    """
    patience, trained = course.schedule.patience, [e for e in history if e["step"] > 0]
    steps = [each["step"] for each in trained if AGREEMENT in each]
    return (
        patience is not None
        and len(steps) > patience
        and chosen(trained, course) not in steps[-patience:]
    )


def losses_of(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The loss of each step."""
    return [each["loss"] for each in history if "loss" in each]


def risen(losses: Sequence[float], uneven: float = 0.0) -> tuple[float, float] | None:
    """The loss at the start and now, where it is higher now than chance in the batches explains;
    else None. Now is the mean of the last WINDOW steps. `uneven`: so much more a batch may have
    than another by what its rows are.

    A slow rise is held against as many first steps. In a run that breaks at once those are broken
    themselves, so the very first ones are looked at, too: by far more, since they are few.
    """
    if len(losses) < FIRST + WINDOW:
        return None
    now, begun = statistics.fmean(losses[-WINDOW:]), statistics.fmean(losses[:FIRST])
    if now > TIMES * begun + NATS + uneven:
        return begun, now
    if len(losses) < 2 * WINDOW:
        return None
    first = losses[:WINDOW]
    begun = statistics.fmean(first)
    error = math.sqrt(2 * statistics.variance(first) / WINDOW)
    bound = begun + max(ERRORS * error, SHARE * abs(begun), LEAST) + uneven
    return (begun, now) if now > bound else None
