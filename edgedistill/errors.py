"""The errors edgedistill raises on purpose, each with what, where and what to do next.

EdgedistillError                exit 1
 +- ConfigError                 a recipe or target does not validate: every problem at once
 +- TokenMixError               the prompts file is missing or a line of it is broken
 +- WeightsError                a pinned model file cannot be had, or has another sha256
 +- TeacherError                the teacher endpoint cannot be used at all
 |   +- TeacherUnreachable      nothing answers at the base URL
 |   +- TeacherRefused          the key, the model ID or the request was refused for good
 +- CollectError                too many calls failed for the recipe's rule
 +- DatasetError                nothing usable is left after curation
 +- TrainingError               a training row or run breaks a promise (no stop token, NaN)
 |   +- Diverged                the loss is not finite, or rises above where it began
 +- RuntimeFailure              a native child process refused, died or hung
 +- DeviceError                 a device cannot be reached, has vanished, or lacks what is needed
 +- StorageError                the disk is full or a file cannot be written
 +- ArtifactError               a stage folder does not hold what its manifest says
 +- TargetError                 what a target asks for cannot be made of this student
 +- MissingTool                 a package of an extra is not installed
 +- UsageError                  exit 2: the command line names what is not there, or cannot be
 +- GateFailed                  exit 3: a measured figure is outside a recipe's or target's bound
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN_PROBLEMS = 20  # of one message


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A question for the known name that is nearest to a mistyped one; "" where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


class EdgedistillError(Exception):
    """Base of every error the CLI shows without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.hint is None else f"{text}\n  {self.hint}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one place of a YAML file; `line` counts from 1, 0 when unknown."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return (
            f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"
        )


def listed(problems: Sequence[Problem]) -> str:
    """One problem a line, and how many more there are: a file of another kind has one in each."""
    lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "".join(f"\n  {line}" for line in lines)


class ConfigError(EdgedistillError):
    """A recipe or target does not validate; `problems` holds all of them."""

    def __init__(self, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} found:{listed(problems)}",
                         hint=hint)  # fmt: skip
        self.problems = tuple(problems)


class TokenMixError(EdgedistillError):
    """The prompts file is missing, empty, or lines of it cannot be used; `problems` names those."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.problems = tuple(problems)


class WeightsError(EdgedistillError):
    """A pinned model file cannot be fetched or is not the file that was pinned."""


class TeacherError(EdgedistillError):
    """The teacher endpoint cannot be used."""


class TeacherUnreachable(TeacherError):
    """Nothing answers at the teacher's base URL."""


class TeacherRefused(TeacherError):
    """The teacher answers, and refuses for good (key, model ID, request)."""


class CollectError(EdgedistillError):
    """More calls failed than the recipe allows."""


class DatasetError(EdgedistillError):
    """Curation leaves too little to train on or to measure with."""


class TrainingError(EdgedistillError):
    """Training data or a training run breaks a promise."""


class Diverged(TrainingError):
    """A training run whose loss is not finite, or rises above where it began."""


class RuntimeFailure(EdgedistillError):
    """A native runtime in its child process refused, died or hung."""


class DeviceError(EdgedistillError):
    """A device elsewhere cannot be reached or used, or was lost on the way."""


class StorageError(EdgedistillError):
    """A file cannot be written: no space, no permission."""


class ArtifactError(EdgedistillError):
    """A stage folder does not hold what its manifest promises."""


class TargetError(EdgedistillError):
    """What a target asks for cannot be made of the recipe's student."""


class MissingTool(EdgedistillError):
    """A package that an extra installs is not there."""


class UsageError(EdgedistillError):
    """The command line names something that is not there, or that cannot be."""

    exit_code = 2


class GateFailed(EdgedistillError):
    """A step's measured figure is outside its bound; `step` names it."""

    exit_code = 3

    def __init__(self, step: str, what: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(f"gate failed at step '{step}': {what}", where=where, hint=hint)
        self.step = step


def told(error: EdgedistillError | OSError) -> EdgedistillError:
    """What the system refused somewhere, as an error of ours."""
    if isinstance(error, EdgedistillError):
        return error
    made = EdgedistillError(str(error) or type(error).__name__, hint="--debug shows where")
    if error.errno is not None:
        made = StorageError(
            error.strerror or str(error),
            where=None if error.filename is None else str(error.filename),
            hint="the system refused this; --debug shows where it was asked",
        )
    made.__cause__ = error
    return made
