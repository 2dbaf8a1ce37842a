"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edgedistill import library
from edgedistill.library import DEFAULT_RECIPE, DEFAULT_TARGET

GIVEN = click.core.ParameterSource.COMMANDLINE
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for every command."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    interrupted: str = "what was finished is kept: run the same command again to go on"


def names(kind: library.Kind) -> Callable[..., list[CompletionItem]]:
    def complete(
        ctx: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = (entry.name for entry in library.entries(kind))
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def refuse(context: click.Context, names: Sequence[str], kind: str) -> None:
    """That none of these options was given, each of which would be ignored: it is for a `kind`.

    Raises:
        click.UsageError: one was.
    """
    options = {param.name: param.opts[-1] for param in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is GIVEN:
            raise click.UsageError(f"{options[name]} is for {kind}")


def several(kind: library.Kind, text: str) -> Callable[[Command], Command]:
    return click.option(
        f"--{kind}", f"{kind}s", metavar="NAME_OR_PATH", multiple=True,
        shell_complete=names(kind), help=f"{text} Repeatable.",
    )  # fmt: skip


recipe_option = click.option(
    "--recipe", metavar="NAME_OR_PATH", default=DEFAULT_RECIPE, show_default=True,
    shell_complete=names("recipe"), help="Recipe by name, folder or file.",
)  # fmt: skip
target_option = click.option(
    "--target", "targets", metavar="NAME_OR_PATH", multiple=True, default=(DEFAULT_TARGET,),
    show_default=True, shell_complete=names("target"), help="Target by name or file; repeatable.",
)  # fmt: skip
workspace_option = click.option(
    "--workspace", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
    default=Path(".edgedistill"), show_default=True, help="Where stages and traces are kept.",
)  # fmt: skip
dist_option = click.option(
    "--dist", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
    default=Path("dist"), show_default=True, help="Where bundles are written.",
)  # fmt: skip
retry_option = click.option(
    "--retry-failed", is_flag=True, help="Ask again what the teacher failed to answer before."
)
layout_option = click.option(
    "--layout", type=click.Choice(["gguf", "optimum"]), default="gguf", show_default=True,
    help="optimum: ONNX as transformers.js and ORTModelForCausalLM read it, into a bundle.",
)  # fmt: skip
processes_option = click.option(
    "--processes", type=click.IntRange(1, 1024), metavar="N",
    help="Train in so many, instead of distill.processes.",
)  # fmt: skip
scaled_option = click.option(
    "--scaled-down", is_flag=True,
    help="The same recipe with small pinned models, 80 prompts and a short training.",
)  # fmt: skip
OWN = {
    "collect": [retry_option, scaled_option],
    "curate": [scaled_option],
    "export": [processes_option, scaled_option, layout_option, dist_option],
    "pack": [processes_option, scaled_option, dist_option],
}  # the options of a stage's command
TRAINING = [processes_option, scaled_option]  # of any other
