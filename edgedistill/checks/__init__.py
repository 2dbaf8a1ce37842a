"""How two answers are compared on a task.

A check says whether an answer is valid by itself, and whether it says the same as the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from edgedistill.artifacts import digest_of, digest_of_file
from edgedistill.check_specs import (
    Check,
    EmbeddingCheck,
    JudgeCheck,
    PythonCheck,
    RegexCheck,
    RougeCheck,
    SqlExecutionCheck,
    TextCheck,
)
from edgedistill.checks.embedding import EmbeddingChecker
from edgedistill.checks.judge import JudgeChecker
from edgedistill.checks.own import PythonChecker
from edgedistill.checks.sql import SqlExecutionChecker
from edgedistill.checks.text import (
    ExactChecker,
    JsonChecker,
    LabelChecker,
    NumberChecker,
    RegexChecker,
    RougeChecker,
)
from edgedistill.judging import identity, judge_of, question_of


class Checker(Protocol):
    """`description` tells in words, for reports, what counts as the same."""

    @property
    def description(self) -> str: ...

    def invalid(self, answer: str) -> str | None:
        """Why the answer cannot be one at all, or None."""

    def same(self, answer: str, teacher: str) -> bool:
        """Whether the answer says what the teacher's says; never true for an invalid one."""


def make_checker(spec: Check) -> Checker:
    """The checker of a recipe's `check`.

    Raises:
        DatasetError: the database, model or file of the check cannot be used.
        MissingTool: it needs a package that is not installed.
    """
    match spec:
        case SqlExecutionCheck():
            return SqlExecutionChecker(spec.database, spec.timeout_seconds)
        case RegexCheck():
            return RegexChecker(spec.pattern, spec.ignore_case)
        case RougeCheck():
            return RougeChecker(spec.min_f1)
        case EmbeddingCheck():
            return EmbeddingChecker(spec.model, spec.min_cosine)
        case PythonCheck():
            return PythonChecker(spec.file, spec.timeout_seconds)
        case JudgeCheck():
            return JudgeChecker(spec)
        case TextCheck():
            return _of_text(spec)


def _of_text(spec: TextCheck) -> Checker:
    if spec.kind == "exact":
        return ExactChecker()
    if spec.kind == "label":
        return LabelChecker(spec.labels)
    if spec.kind == "json":
        return JsonChecker()
    if spec.kind == "number":
        return NumberChecker(spec.tolerance)
    assert_never(spec.kind)


def about(checker: Checker, prompt: str, history: Sequence[Mapping[str, str]] = ()) -> Checker:
    """The check for answers to one prompt: a judge needs the question, other checks do not."""
    if isinstance(checker, JudgeChecker):
        return checker.about(question_of(prompt, history))
    return checker


def require_usable(checker: Checker) -> None:
    """That a check can say something, before much work is done whose answers it is for.

    Raises:
        TeacherError, WeightsError, RuntimeFailure: its judge cannot be asked.
    """
    if isinstance(checker, JudgeChecker):
        checker.probe()


def at_rest(checker: Checker) -> None:
    """Free what a check holds until it is used again: a local judge's memory and cores, which would
    be missing where a model is measured."""
    if isinstance(checker, JudgeChecker):
        checker.close()


def kept_in(spec: Check, traces: Path) -> Check:
    """The check, whose judge keeps what was answered in a trace store, unless its recipe names
    another."""
    if isinstance(spec, JudgeCheck) and spec.kept_in is None:
        return spec.model_copy(update={"kept_in": traces})
    return spec


def thrown_by(checker: Checker) -> Mapping[str, str]:
    """What a check threw, by the answer it threw on: only one that a user wrote does, and a judge
    that gives no verdict."""
    return checker.thrown if isinstance(checker, PythonChecker | JudgeChecker) else {}


def forget_thrown(checker: Checker) -> None:
    """Before a comparison whose own errors are to be told from those before it."""
    if isinstance(checker, PythonChecker | JudgeChecker):
        checker.thrown.clear()


def check_identity(spec: Check) -> dict[str, Any]:
    """What of a check decides its verdicts: a file or folder counts by its content, not by its
    path; a judge by what it is and how it is asked, not by where."""
    if isinstance(spec, JudgeCheck):
        return {"kind": spec.kind, **identity(judge_of(spec))}
    values = spec.model_dump()
    return {k: _content(v) if isinstance(v, Path) else v for k, v in values.items()}


def _content(path: Path) -> str:
    if path.is_file():
        return digest_of_file(path)
    return digest_of({f.name: digest_of_file(f) for f in sorted(path.iterdir()) if f.is_file()})
