"""Validation during training: does the model answer as the teacher does?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgedistill.checks import Checker
from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt


def agreement(
    model: Any, rows: Sequence[EvalRow], shown: StudentPrompt, max_tokens: int, checker: Checker
) -> float:
    """Share of rows on which the greedy answer of a transformers model is the teacher's."""
    from edgedistill.torch_runtime import generate

    asked = [shown.prompt_ids(row.prompt, row.history) for row in rows]
    made = generate(model, asked, max_tokens, shown.stop_ids)
    same = [
        checker.same(shown.decode(ids).strip(), row.answer)
        for ids, row in zip(made, rows, strict=True)
    ]
    return sum(same) / len(same)
