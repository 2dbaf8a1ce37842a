"""Validation during training: does the model answer as the teacher does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.checks import Checker
from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt
from edgedistill.results import Sample
from edgedistill.training.course import Examined


@dataclass(frozen=True)
class Exam:
    """What a model in training is asked, and how its answers, `cleaned`, are judged; `samples` of
    them are kept to be looked at."""

    rows: Sequence[EvalRow]
    shown: StudentPrompt
    max_tokens: int
    checker: Checker
    samples: int = 0
    cleaned: Callable[[str], str] = str.strip

    def take(self, model: Any, precision: str = "fp32") -> Examined:
        """Share of rows on which the greedy answer of a transformers model is the teacher's."""
        given = self.answers(model, precision)
        found = [
            Sample(row.prompt, row.answer, answer, self.checker.same(answer, row.answer))
            for row, answer in zip(self.rows, given, strict=True)
        ]
        same = sum(sample.same for sample in found) / len(found)
        return Examined(same, samples=tuple(found[: self.samples]))

    def answers(self, model: Any, precision: str = "fp32") -> list[str]:
        """The greedy answer to each row."""
        from edgedistill.torch_runtime import generate
        from edgedistill.training.loss import autocast

        asked = [self.shown.prompt_ids(row.prompt, row.history) for row in self.rows]
        with autocast(model.device, precision):
            made = generate(model, asked, self.max_tokens, self.shown.stop_ids)
        return [self.cleaned(self.shown.decode(ids)) for ids in made]
