"""The command `bench`: of a build, as one of its stages, or of any model file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedistill.cli_options import TRAINING, recipe_option, target_option, workspace_option
from edgedistill.cli_update import Show, listening, loaded

if TYPE_CHECKING:
    from edgedistill.progress import Progress
    from edgedistill.recipe import Recipe
    from edgedistill.sitting import Plan

Stage = Callable[[str, Sequence[str], Path, int | None, bool], None]
NEEDS_MODEL = ("prompts", "sample", "system", "max_tokens", "threads", "repeats", "out")
GIVEN = click.core.ParameterSource.COMMANDLINE


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show, stage: Stage) -> None:
    """Add the command; `stage(recipe, targets, workspace, processes, scaled_down)` is the one of a
    build."""
    bench = _bench(show, stage)
    for option in reversed([recipe_option, workspace_option, target_option, *TRAINING, *OWN]):
        bench = option(bench)
    bench = click.argument("model", required=False, type=click.Path(path_type=Path))(bench)
    cli.command("bench")(common(bench))


OWN = (
    click.option(
        "--prompts", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="MODEL: the prompts to ask, instead of the recipe's.",
    ),
    click.option(
        "--sample", metavar="N", type=click.IntRange(1), help="MODEL: only so many of them."
    ),
    click.option("--system", metavar="TEXT", help="MODEL: its system message."),
    click.option(
        "--max-tokens", metavar="N", type=click.IntRange(1), help="MODEL: of an answer, at most."
    ),
    click.option(
        "--threads", metavar="N", type=click.IntRange(1), help="MODEL: by default one a core."
    ),
    click.option(
        "--repeats", metavar="N", type=click.IntRange(2, 100), default=3, show_default=True,
        help="MODEL: in so many processes, one behind the other.",
    ),
    click.option(
        "-o", "--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="MODEL: keep the result as JSON.",
    ),
)  # fmt: skip


def _bench(show: Show, stage: Stage) -> Callable[..., None]:
    def bench(
        model: Path | None, recipe: str, workspace: Path, targets: Sequence[str],
        processes: int | None, scaled_down: bool, **own: Any,
    ) -> None:  # fmt: skip
        """Measure a build on held-out prompts, or any MODEL: a GGUF file, or a bundle of one.

        Without MODEL what a build needs is reused from the workspace, or made first. Of a MODEL
        speed is measured, and with --prompts or --recipe how it answers these prompts: how long
        that takes, and how often it gives the teacher's answer and their reference by the recipe's
        check. Of a recipe the held-out prompts are asked.
        """
        context = click.get_current_context()
        if model is None:
            _require_none(context)
            stage(recipe, targets, workspace, processes, scaled_down)
            return
        named = context.get_parameter_source("recipe") is GIVEN
        show(*_measured(model, recipe if named else None, workspace, own))

    return bench


def _require_none(context: click.Context) -> None:
    for name in NEEDS_MODEL:
        if context.get_parameter_source(name) is GIVEN:
            raise click.UsageError(f"--{name.replace('_', '-')} is for a MODEL, and none is given")


def _measured(
    model: Path, recipe: str | None, workspace: Path, own: dict[str, Any]
) -> tuple[Any, Any]:
    from edgedistill import tables
    from edgedistill.artifacts import require_writable
    from edgedistill.history import remember
    from edgedistill.model_prompt import asked_model
    from edgedistill.result_file import write_result
    from edgedistill.sitting import sit

    if own["out"] is not None and not own["out"].parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {own['out'].parent}; make it first")
    held = None if recipe is None else loaded(recipe)
    student = None if held is None else held.student
    asked = asked_model(model, student, own["system"], own["max_tokens"])
    require_writable(workspace)
    with listening() as progress:
        result = sit(asked, _plan(held, workspace, own, progress), progress)
    if own["out"] is not None:
        write_result(result, own["out"])
    remember(result, workspace)
    return tables.sitting, json.loads(json.dumps(result.to_json()))


def _plan(recipe: Recipe | None, workspace: Path, own: dict[str, Any], progress: Progress) -> Plan:
    from edgedistill.sitting import Plan, held_out_of, prompts_of

    prompts = None
    if own["prompts"] is not None:
        prompts = prompts_of(own["prompts"], own["sample"])
    elif recipe is not None:
        prompts = held_out_of(recipe, own["sample"], workspace, progress)
    check = None if recipe is None else recipe.check
    return Plan(own["repeats"], threads=own["threads"], prompts=prompts, check=check)
