"""Pairs of answers on disk: one JSON object a line, the better answer and the worse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedistill.artifacts import write_atomic
from edgedistill.distill.losses import Pair
from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt
from edgedistill.training.data import training_rows


@dataclass(frozen=True)
class Preference:
    """A row whose `answer` is the better one; `rejected` None: there is no worse one to tell it
    from. `reference`: log-likelihoods of both before the training, in nats."""

    row: EvalRow
    rejected: str | None
    reference: tuple[float, float] = (0.0, 0.0)


def write_pairs(file: Path, pairs: Sequence[Preference]) -> None:
    """What `read_pairs` reads."""
    lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    write_atomic(file, "".join(lines).encode())


def read_preferences(file: Path) -> list[Preference]:
    """The pairs of a file, as text."""
    with file.open(encoding="utf-8") as stream:
        found = [json.loads(line) for line in stream]
    return [
        Preference(
            EvalRow(**{**each["row"], "history": tuple(each["row"]["history"])}),
            each["rejected"],
            (each["reference"][0], each["reference"][1]),
        )
        for each in found
    ]


def read_pairs(file: Path, shown: StudentPrompt, max_length: int | None) -> Iterator[Pair]:
    """The same, tokenized.

    Raises:
        DatasetError: there are none.
        TrainingError: an answer breaks a promise of supervision.
    """
    told = read_preferences(file)
    better = training_rows([each.row for each in told], shown, max_length)
    for each, chosen in zip(told, better, strict=True):
        rejected = None
        if each.rejected is not None:
            worse = EvalRow(**{**vars(each.row), "answer": each.rejected})
            rejected = training_rows([worse], shown, max_length)[0]
        yield Pair(chosen, rejected, each.reference)
