"""Validation during training: does the model answer as the teacher does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.checks import Checker, about
from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt
from edgedistill.results import Sample
from edgedistill.training.course import Examined
from edgedistill.training.data import PART_TOKENS, training_rows


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
        found = self.samples_of(model, precision)
        same = sum(sample.same for sample in found) / len(found)
        return Examined(same, samples=tuple(found[: self.samples]))

    def samples_of(self, model: Any, precision: str = "fp32") -> list[Sample]:
        """What a model answers to each row."""
        given = self.answers(model, precision)
        return [
            Sample(row.prompt, row.answer, answer, self._same(row, answer))
            for row, answer in zip(self.rows, given, strict=True)
        ]

    def _same(self, row: EvalRow, answer: str) -> bool:
        return about(self.checker, row.prompt, row.history).same(answer, row.answer)

    def nll(self, model: Any, precision: str = "fp32") -> float:
        """Negative log-likelihood of the teacher's answers to all rows, in nats a token: it tells
        finely what the share of a few rows tells coarsely."""
        import torch

        from edgedistill.training.head import nll_of, token_losses
        from edgedistill.training.loss import autocast
        from edgedistill.training.packing import hidden_states, moved, pack, packed_attention, split

        total, count, where = 0.0, 0, model.device
        rows = sorted(training_rows(self.rows, self.shown, None), key=len)
        with torch.no_grad(), packed_attention(model), autocast(where, precision):
            for few in split(rows, PART_TOKENS[where.type]):
                part = moved(pack(few), where)
                losses = token_losses(model, hidden_states(model, part), nll_of(part["labels"]))
                total, count = total + float(losses.sum()), count + len(losses)
        return total / count

    def answers(self, model: Any, precision: str = "fp32") -> list[str]:
        """The greedy answer to each row."""
        from edgedistill.torch_runtime import generate
        from edgedistill.training.loss import autocast

        asked = [self.shown.prompt_ids(row.prompt, row.history) for row in self.rows]
        with autocast(model.device, precision):
            made = generate(model, asked, self.max_tokens, self.shown.stop_ids)
        return [self.cleaned(self.shown.decode(ids)) for ids in made]
