"""The command line: each command parses, calls one function and shows what it returns.

This is the one place that prints results, catches errors and exits: 0 done, 1 failed, 2 wrong
usage, 3 a gate was missed or a --fail-if holds, 130 interrupted, 143 the same by SIGTERM.
Everything heavy is imported inside commands.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from edgedistill import (
    __version__,
    cli_bench,
    cli_compare,
    cli_evaluate,
    cli_judge,
    cli_machine,
    cli_tuning,
    cli_update,
    library,
)
from edgedistill.cli_options import (
    OWN,
    TRAINING,
    Settings,
    dist_option,
    names,
    processes_option,
    recipe_option,
    retry_option,
    scaled_option,
    several,
    target_option,
    workspace_option,
)
from edgedistill.errors import ConfigError, EdgedistillError, GateFailed, TokenMixError, told
from edgedistill.library import DEFAULT_TARGET
from edgedistill.printable import printable
from edgedistill.termination import Termination

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgedistill.recipe import Recipe
    from edgedistill.target import Target

Command = TypeVar("Command", bound=Callable[..., Any])
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
ONCE_PER_RECIPE = {
    "collect": "Ask the teacher every prompt of the token mix; nothing is asked twice.",
    "curate": "Filter the answers and split them by prompt.",
    "distill": "Train the student on what the teacher said, by the recipe's method.",
    "merge": "Merge the adapter into the student's weights.",
    "export": "Write the merged model as GGUF, or in optimum's layout, and check it. "
    "A target's own ONNX model is made by quantize.",
}
ONCE_PER_TARGET = {
    "quantize": "Make and measure the target's candidate types; the smallest that passes is "
    "chosen, unless held-out prompts refuse it in bench.",
    "pack": "Write the bundle: model, manifest, card, report. The same as build.",
}


class InOrder(click.Group):
    """Lists commands in the order of the flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    words, settings = list(sys.argv[1:] if arguments is None else arguments), Settings()
    # What these say to their own users is noise to ours.
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)(\.|$)")
    ended = Termination()
    try:
        # What a command gives to ctx.exit() comes back as the value; commands return None.
        code = cli.main(words, prog_name="edgedistill", standalone_mode=False, obj=settings)
    except (EdgedistillError, OSError) as error:
        _fail(told(error), settings)
    except click.ClickException as error:
        # The words may be wrong before --json is reached.
        if settings.json or "--json" in words:
            _print_error({"kind": "UsageError", "what": error.format_message()}, error.exit_code)
        else:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes any of them for Ctrl-D
            raise error.__cause__ from None
        what = f"interrupted; {settings.interrupted}"
        if settings.json:
            _print_error({"kind": "Interrupted", "what": what}, ended.exit_code)
        click.echo(what, err=True)
        sys.exit(ended.exit_code)
    finally:
        ended.stop()
    sys.exit(code or 0)


def _fail(error: EdgedistillError, settings: Settings) -> NoReturn:
    if settings.debug:
        click.echo("".join(traceback.format_exception(error)), err=True)
    if settings.json:
        value: dict[str, Any] = {"kind": type(error).__name__, "what": error.what}
        value |= {"where": error.where, "hint": error.hint}
        if isinstance(error, ConfigError | TokenMixError):
            value["problems"] = [asdict(problem) for problem in error.problems]
        if isinstance(error, GateFailed):
            value["step"] = error.step
        _print_error(value, error.exit_code)
    else:
        click.echo(printable(f"error: {error}"), err=True)
    sys.exit(error.exit_code)


def _print_error(value: dict[str, Any], exit_code: int) -> None:
    click.echo(json.dumps({"error": {**value, "exit_code": exit_code}}, indent=2))


def _show(render: Callable[[Any], RenderableType], value: Any) -> None:
    """Print one result: as JSON, or as `render` shows the same data."""
    if click.get_current_context().ensure_object(Settings).json:
        click.echo(json.dumps(value, indent=2, default=str))
        return
    from rich.console import Console

    from edgedistill.console import Shown

    # A pipe has no width; a narrow guess would break paths and numbers apart.
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140).print(
        Shown(render(value))
    )


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and parameter.name is not None:
        setattr(ctx.ensure_object(Settings), parameter.name, True)


def _flag(name: str, text: str) -> Callable[[Command], Command]:
    return click.option(
        f"--{name}", is_flag=True, is_eager=True, expose_value=False, callback=_remember, help=text
    )


def common(command: Command) -> Command:
    """Options that may stand before or after the command's name."""
    command = _flag("debug", "Show the traceback of an error.")(command)
    command = _flag("quiet", "Show no progress.")(command)
    return _flag("json", "Print the result as JSON, and nothing else, on stdout.")(command)


@click.group(cls=InOrder, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="edgedistill")
@common
def cli() -> None:
    """Distil what a black-box model does for your product onto a device, and prove it.

    Start with: edgedistill doctor, then: edgedistill build --target laptop
    """


@cli.command()
@common
@recipe_option
@target_option
@workspace_option
@dist_option
@retry_option
@processes_option
@scaled_option
def build(
    recipe: str, targets: Sequence[str], workspace: Path, dist: Path, retry_failed: bool,
    processes: int | None, scaled_down: bool,
) -> None:  # fmt: skip
    """The whole job: from prompts and a teacher to a bundle for each target."""
    way = _Way(retry_failed, processes, scaled_down)
    _build("pack", recipe, targets, workspace, dist, way)


@dataclass(frozen=True)
class _Way:
    """How a recipe is built."""

    retry: bool = False
    processes: int | None = None
    scaled_down: bool = False


def _build(
    until: str, recipe: str, targets: Sequence[str], workspace: Path, dist: Path, way: _Way,
    layout: str = "gguf",
) -> None:  # fmt: skip
    started = time.monotonic()
    held, devices = _load(recipe, targets)
    from edgedistill import console, pipeline, tables
    from edgedistill.scaled import as_asked

    held, changes = as_asked(held, way.processes, way.scaled_down)

    quiet = click.get_current_context().ensure_object(Settings).quiet
    place = pipeline.Workspace(workspace, dist)
    with console.listening(
        quiet=quiet, terminal=sys.stderr.isatty(), write=partial(click.echo, err=True)
    ) as progress:
        progress.note(f"recipe: {library.shown(library.find('recipe', recipe))}")
        for name in targets if until not in ONCE_PER_RECIPE else ():
            progress.note(f"target: {library.shown(library.find('target', name))}")
        for change in changes:
            progress.note(f"scaled down: {change}")
        results = pipeline.build(held, devices, place, progress, until, way.retry, layout)
    seconds = time.monotonic() - started
    _show(tables.build, tables.build_value(held.name, results, progress.ran, seconds))


def _load(recipe: str, targets: Sequence[str]) -> tuple[Recipe, list[Target]]:
    paths = library.find("recipe", recipe), [library.find("target", name) for name in targets]
    from edgedistill.validate import load_together

    return load_together(*paths)


def _add_stage(verb: str, text: str, *, per_target: bool) -> None:
    def stage(
        recipe: str, workspace: Path, targets: Sequence[str] = (DEFAULT_TARGET,),
        dist: Path = Path("dist"), retry_failed: bool = False, layout: str = "gguf",
        processes: int | None = None, scaled_down: bool = False,
    ) -> None:  # fmt: skip
        way = _Way(retry_failed, processes, scaled_down)
        _build(verb, recipe, targets, workspace, dist, way, layout)

    options = [recipe_option, workspace_option, *([target_option] if per_target else [])]
    options += OWN.get(verb, TRAINING)
    for option in reversed(options):
        stage = option(stage)
    text += "\n\nWhat it needs is reused from the workspace, or made first."
    cli.command(verb, help=text)(common(stage))


def _bench_stage(
    recipe: str, targets: Sequence[str], workspace: Path, processes: int | None, scaled_down: bool
) -> None:
    way = _Way(processes=processes, scaled_down=scaled_down)
    _build("bench", recipe, targets, workspace, Path("dist"), way)


for _verb, _text in ONCE_PER_RECIPE.items():
    _add_stage(_verb, _text, per_target=False)
_add_stage("quantize", ONCE_PER_TARGET["quantize"], per_target=True)
cli_bench.add_to(cli, common, _show, _bench_stage)
_add_stage("pack", ONCE_PER_TARGET["pack"], per_target=True)


@cli.command()
@common
@click.argument("name")
@click.option(
    "--into", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
    default=Path("recipes"), show_default=True, help="Where the recipe's folder is made.",
)  # fmt: skip
def init(name: str, into: Path) -> None:
    """Make a new recipe folder with every field explained."""
    from rich.text import Text

    from edgedistill.initialise import initialise

    value = {"recipe": str(initialise(name, into))}
    _show(lambda made: Text(f"made {made['recipe']}; edit it, then do as it says on top"), value)


@cli.command()
@common
@several("recipe", "By default all.")
@several("target", "By default all.")
def validate(recipes: Sequence[str], targets: Sequence[str]) -> None:
    """Check recipes, their prompts and targets together: all problems at once."""
    paths = library.named_or_all("recipe", recipes), library.named_or_all("target", targets)
    from edgedistill import tables
    from edgedistill.validate import validate as check

    _show(tables.validated, check(*paths))


@cli.command()
@common
def recipes() -> None:
    """List the recipes: yours and the shipped ones."""
    from edgedistill import catalogue, tables

    _show(tables.recipes, catalogue.recipe_rows())


@cli.command()
@common
@click.argument("name", required=False, shell_complete=names("target"))
def targets(name: str | None) -> None:
    """List the targets, or explain every field of one."""
    from edgedistill import catalogue, tables
    from edgedistill.target import load_target

    if name is None:
        _show(tables.targets, catalogue.target_rows())
    else:
        path = library.find("target", name)
        _show(tables.target, catalogue.explain(load_target(path, library.shown(path))))


@cli.command()
@common
@recipe_option
@target_option
@workspace_option
@scaled_option
def status(recipe: str, targets: Sequence[str], workspace: Path, scaled_down: bool) -> None:
    """Show what the workspace holds, and what a build would reuse."""
    held, devices = _load(recipe, targets)
    from edgedistill import catalogue, pipeline, planning, tables
    from edgedistill import workspace as held_by
    from edgedistill.scaled import as_asked

    held, _ = as_asked(held, scaled_down=scaled_down)

    place = pipeline.Workspace(workspace, Path("dist"))
    reached, problems = catalogue.reached(place, [recipe], targets)
    ends: dict[str, list[str]] = {}
    value = {
        "workspace": str(workspace),
        "in_use": held_by.in_use(workspace),
        "traces_bytes": held_by.traces_bytes(workspace),
        "folders": tables.plain(held_by.holds(workspace, reached)),
        "plan": tables.plain(planning.plan(held, devices, place, ends)),
        "problems": [str(problem) for problem in problems],
        "ends": [f"{', '.join(names)}: {text}" for text, names in ends.items()],
    }
    _show(tables.status, value)


@cli.command()
@common
@workspace_option
@several("recipe", "Keep what this one outside recipes/ needs, too.")
@several("target", "Keep what this one outside targets/ needs, too.")
@click.option("--traces", is_flag=True, help="Remove the teacher's answers, too.")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def gc(
    workspace: Path, recipes: Sequence[str], targets: Sequence[str],
    traces: bool, dry_run: bool, yes: bool,
) -> None:  # fmt: skip
    """Remove stage folders that no recipe and target lead to. Answers stay unless --traces."""
    from edgedistill import catalogue, pipeline, tables
    from edgedistill import workspace as held_by

    place = pipeline.Workspace(workspace, Path("dist"))
    reached, problems = catalogue.reached(place, recipes, targets)
    if problems:
        raise ConfigError(problems, hint="what they need is unknown: mend or move these files")
    condemned = held_by.unreached(held_by.holds(workspace, reached))
    answers = traces * held_by.traces_bytes(workspace)
    size, folders = answers + sum(c.bytes for c in condemned), [str(c.folder) for c in condemned]
    value = {"removed": False, "folders": folders, "answers_bytes": answers, "bytes": size}
    if size and not dry_run and (yes or _agreed(tables.removal, value)):
        value |= {"removed": True, "bytes": held_by.gc(workspace, condemned, traces=traces)}
    _show(tables.removal, value)


def _agreed(render: Callable[[Any], RenderableType], value: dict[str, Any]) -> bool:
    """Ask on the terminal; a program (--json, a pipe) must say --yes instead."""
    if click.get_current_context().ensure_object(Settings).json or not sys.stdin.isatty():
        raise click.UsageError("give --yes to remove without being asked, or --dry-run to look")
    _show(render, value)
    return click.confirm("remove them?")


cli_machine.add_to(cli, common, _show, _load)
cli_tuning.add_to(cli, common, _show)
cli_compare.add_to(cli, common, _show)
cli_judge.add_to(cli, common, _show)
cli_evaluate.add_to(cli, common, _show)
cli_update.add_to(cli, common, _show)
