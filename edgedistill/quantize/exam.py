"""What candidates are measured with, on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Dataset,
)
from edgedistill.check_specs import Check
from edgedistill.checks import Checker, about, check_identity, make_checker
from edgedistill.errors import DatasetError
from edgedistill.fidelity import (
    EvalRow,
    follows,
    read_rows,
    rows_that_fit,
)
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtimes import LLAMA, TRAITS, Opened, Runtime, Traits, open_runtime


@dataclass(frozen=True)
class Exam:
    """What candidates are measured with: validation rows, the student's prompt, the check, and the
    runtime they run in."""

    dataset: Dataset
    prompt: StudentSpec
    check: Check
    runtime: str = LLAMA

    def identity(self) -> dict[str, Any]:
        shown = {"system", "prompt", "max_tokens"}
        return {
            "check": check_identity(self.check),
            "prompt": self.prompt.model_dump(mode="json", include=shown),
        }

    @property
    def traits(self) -> Traits:
        return TRAITS[self.runtime]

    def chosen(self, ids: Sequence[str]) -> list[EvalRow]:
        """The validation rows with these IDs."""
        return [row for row in self._validation() if row.id in set(ids)]

    def _validation(self) -> list[EvalRow]:
        return read_rows(self.dataset.folder / "validation.jsonl")

    def sitting(self, student: StudentPrompt, cases: Sequence[Case]) -> Sitting:
        """One file's turn with these cases."""
        checker = make_checker(self.check)
        return Sitting(student, self.prompt.max_tokens, checker, cases, self.runtime)

    def rows(self, student: StudentPrompt, progress: Progress) -> list[EvalRow]:
        """The validation rows that a format is chosen on."""
        every = self._validation()
        rows = rows_that_fit(every, student)
        if not rows:
            raise DatasetError(
                "there are no validation rows to choose a format on",
                hint="raise curate.split.validation, or give more prompts",
            )
        if len(rows) < len(every):
            progress.note(
                f"formats are chosen on {len(rows)} of {len(every)} validation prompts: "
                "the logits of more do not fit into 2 GB of scratch space"
            )
        return rows


@dataclass(frozen=True)
class Case:
    """One validation row as token IDs; its answer's logits start at row `skip` of the baseline."""

    row: EvalRow
    asked: list[int]
    answer: list[int]
    skip: int


@dataclass(frozen=True)
class Sitting:
    """A file's answers to the cases."""

    student: StudentPrompt
    max_tokens: int
    checker: Checker
    cases: Sequence[Case]
    kind: str

    def agrees(self, runtime: Runtime, case: Case, logits: Path) -> bool:
        """Append the logits of the teacher's answer to `logits`; does the check call the greedy
        answer the same?"""
        likely = runtime.logits(case.asked + case.answer, len(case.asked), logits)
        if follows(likely, case.answer, self.max_tokens):
            return self.checker.same(case.row.answer, case.row.answer)
        made = runtime.generate(case.asked, self.max_tokens, self.student.stop_ids)
        check = about(self.checker, case.row.prompt, case.row.history)
        return check.same(self.student.decode(made.ids).strip(), case.row.answer)

    def runtime(self, model: Path) -> Opened:
        longest = max(
            len(case.asked) + max(len(case.answer), self.max_tokens) for case in self.cases
        )
        return open_runtime(self.kind, model, context_tokens=longest)


def cases_of(rows: Sequence[EvalRow], student: StudentPrompt) -> list[Case]:
    cases, skip = [], 0
    for row in rows:
        answer = student.answer_ids(row.answer)
        cases.append(Case(row, student.prompt_ids(row.prompt, row.history), answer, skip))
        skip += len(answer)
    return cases
