"""What a build would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgedistill.errors import (
    CollectError,
    DatasetError,
    EdgedistillError,
    GateFailed,
    TargetError,
)
from edgedistill.pipeline import Workspace, optimum_stages, run_stages
from edgedistill.progress import Silent
from edgedistill.recipe import Recipe
from edgedistill.recorder import Recorder
from edgedistill.target import Target

Step = tuple[str, str, Path]


def plan(
    recipe: Recipe,
    targets: Sequence[Target],
    workspace: Workspace,
    ends: dict[str, list[str]] | None = None,
) -> list[Step]:
    """What `build` would do: (stage, "reused" or "would run", folder).

    It ends with the first stage that would run: the identity of the ones behind it depends on
    what that one makes. It also ends where a gate is missed, and, for a target that cannot be made
    of the student, with the student; `ends` is told why: text, names of targets.
    """
    steps: list[Step] = []
    for target in targets:
        found, error = _walk(partial(run_stages, recipe, [target], workspace, page=False))
        steps = list(dict.fromkeys([*steps, *found]))
        if error is not None and ends is not None:
            ends.setdefault(str(error), []).append(target.name)
    return steps


def everything(recipe: Recipe, targets: Sequence[Target], workspace: Workspace) -> list[Step]:
    """The plan of a build, and that of an export in optimum's layout."""
    steps = plan(recipe, targets, workspace)
    if targets:  # none of them shapes it; it also reaches collect where a target ends before
        steps += _walk(partial(optimum_stages, recipe, targets[0], workspace))[0]
    return list(dict.fromkeys(steps))


def _walk(build: Callable[..., object]) -> tuple[list[Step], EdgedistillError | None]:
    """The steps to the first that would run, and what ends the build besides: a gate, or a target
    that the student cannot be made into."""
    planner = _Planner()
    try:
        build(log=Recorder(planner))
    except (TargetError, GateFailed, CollectError, DatasetError) as error:
        return planner.steps, error
    except _WouldRun:
        pass
    return planner.steps, None


class _WouldRun(BaseException):
    """Ends a plan; never leaves this module. No `except Exception` on the way may swallow it."""


@dataclass
class _Planner(Silent):
    steps: list[Step] = field(default_factory=list)

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self.steps.append((name, "reused" if reused else "would run", folder))
        if not reused:
            raise _WouldRun
