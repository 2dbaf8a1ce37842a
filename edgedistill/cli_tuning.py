"""The commands that look for better values, or for the worth of more traces: `sweep` and
`learning-curve`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgedistill import library
from edgedistill.cli_options import (
    processes_option,
    recipe_option,
    scaled_option,
    workspace_option,
)
from edgedistill.cli_update import Show, listening

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgedistill.artifacts import Finished
    from edgedistill.progress import Progress
    from edgedistill.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])
Number = TypeVar("Number", int, float)
SIZES = "0.125,0.25,0.5,1"


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show) -> None:
    """Add these commands to the command line's group."""
    cli.command("sweep")(common(_sweep(show)))
    cli.command("learning-curve")(common(_learning_curve(show)))


def _list_of(kind: Callable[[str], Number]) -> Callable[..., tuple[Number, ...]]:
    """What reads `2e-4,4e-4`."""

    def read(
        ctx: click.Context, parameter: click.Parameter, value: str | None
    ) -> tuple[Number, ...]:
        if value is None:
            return ()
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2") from error

    return read


def _list_option(
    name: str, kind: Callable[[str], Any], text: str, **rest: Any
) -> Callable[[Command], Command]:
    return click.option(f"--{name}", metavar="N,N", callback=_list_of(kind), help=text, **rest)


def _sweep(show: Show) -> Callable[..., None]:
    @recipe_option
    @workspace_option
    @processes_option
    @scaled_option
    @_list_option("learning-rate", float, "By default half, once and twice the recipe's.")
    @_list_option("rank", int, "Of LoRA; alpha goes with it. By default the recipe's.")
    @_list_option("epochs", float, "By default the recipe's.")
    def sweep(
        recipe: str, workspace: Path, learning_rate: tuple[float, ...], rank: tuple[int, ...],
        epochs: tuple[float, ...], processes: int | None, scaled_down: bool,
    ) -> None:  # fmt: skip
        """Try learning rates, ranks and epochs on a small grid, and leave early losers.

        Every trial is examined on validation prompts after a third of its steps, and the worse half
        is left; and so on until one is. A build with the winner's values reuses its training.
        """
        from edgedistill.sweep import Grid
        from edgedistill.sweep import sweep as try_all

        grid = Grid(learning_rate, rank, epochs)
        with listening() as progress:
            asked = _asked(recipe, workspace, processes, scaled_down, progress)
            done = try_all(asked, grid, workspace, progress)
        show(_swept, _value(done))

    return sweep


def _learning_curve(show: Show) -> Callable[..., None]:
    @recipe_option
    @workspace_option
    @processes_option
    @scaled_option
    @_list_option(
        "sizes", float, "Shares of the training rows.", default=SIZES, show_default=True
    )  # fmt: skip
    @click.option(
        "--seeds", type=click.IntRange(1), default=1, show_default=True,
        help="Trainings for each size, each on rows of its own.",
    )  # fmt: skip
    def learning_curve(
        recipe: str, workspace: Path, sizes: tuple[float, ...], seeds: int,
        processes: int | None, scaled_down: bool,
    ) -> None:  # fmt: skip
        """Measure agreement against the number of traces, and forecast twice as many.

        Parts of the training rows are learnt with the recipe's values, and examined on validation
        prompts. Where the points carry no forecast, that is said instead.
        """
        from edgedistill.learning_curve import learning_curve as draw

        with listening() as progress:
            asked = _asked(recipe, workspace, processes, scaled_down, progress)
            done = draw(asked, sizes, seeds, workspace, progress)
        show(_drawn, _value(done))

    return learning_curve


def _asked(
    recipe: str, workspace: Path, processes: int | None, scaled_down: bool, progress: Progress
) -> Recipe:
    from edgedistill.scaled import as_asked
    from edgedistill.validate import load_together
    from edgedistill.workspace import keeping

    read, _ = load_together(library.find("recipe", recipe), [])
    held, changes = as_asked(read, processes, scaled_down)
    for change in changes:
        progress.note(f"scaled down: {change}")
    return keeping(held, workspace)


def _value(done: Finished) -> dict[str, Any]:
    stage = done.manifest["stage"]
    return {**done.facts, "folder": str(done.folder), "page": str(done.folder / f"{stage}.html")}


def _swept(value: Any) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from edgedistill.tables import swept

    lines = f"\n{value['said']}\n\n{value['lines']}\n\ndrawn: {value['page']}"
    return Group(swept(value), Text(lines))


def _drawn(value: Any) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from edgedistill.tables import learning_curve

    notes = "".join(f"\n{note}" for note in value["notes"])
    lines = f"\n{value['said']}{notes}\n\ndrawn: {value['page']}"
    return Group(learning_curve(value), Text(lines))
