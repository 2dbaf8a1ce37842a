"""The commands of a bundle's later life: `lora`, `adapt`, `update make`, `update apply`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgedistill.cli_options import workspace_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgedistill.progress import Progress
    from edgedistill.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])
Show = Callable[[Callable[[Any], "RenderableType"], Any], None]
SAMPLES = 8


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show) -> None:
    """Add these commands to the command line's group."""

    cli.command("lora")(common(_lora(show)))
    cli.command("adapt")(common(_adapt(show)))

    @cli.group()
    @common
    def update() -> None:
        """Update bundles in the field: a few MB instead of the whole model."""

    update.command("make")(common(_make(show)))
    update.command("apply")(common(_apply(show)))


recipe_option = click.option(
    "--recipe", metavar="NAME_OR_PATH", required=True, help="Recipe by name, folder or file.",
)  # fmt: skip
type_option = click.option(
    "--type", type=click.Choice(("F32", "F16", "Q8_0")), default="F16", show_default=True,
    help="How the adapter's numbers are stored; Q8_0 is half of F16.",
)  # fmt: skip


def _lora(show: Show) -> Callable[..., None]:
    @recipe_option
    @workspace_option
    @type_option
    @click.option(
        "-o", "--output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        required=True, help="The GGUF file.",
    )  # fmt: skip
    def lora(recipe: str, workspace: Path, type: str, output: Path) -> None:
        """Write the adapter alone as GGUF, for apps that hold the base model already.

        Asks the teacher and trains first, as build does, where the workspace has no adapter yet.
        """
        from edgedistill import pipeline
        from edgedistill.artifacts import write_atomic

        place = pipeline.Workspace(workspace, output.parent)
        with listening() as progress:
            _, stages = pipeline.adapter_alone(loaded(recipe), place, progress, type)
        done = stages["lora"]
        write_atomic(output, (done.folder / done.facts["file"]).read_bytes())
        show(_alone, {"file": str(output), "bytes": output.stat().st_size, **done.facts})

    return lora


def _adapt(show: Show) -> Callable[..., None]:
    @click.argument("bundle", type=click.Path(path_type=Path))
    @recipe_option
    @workspace_option
    @type_option
    @click.option(
        "-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
        required=True, help="The new bundle.",
    )  # fmt: skip
    def adapt(bundle: Path, recipe: str, workspace: Path, type: str, output: Path) -> None:
        """Train an adapter on top of the model in BUNDLE, and write the bundle with both.

        The recipe's student.weights must be the GGUF file in BUNDLE. What it needs is reused from
        the workspace, or made first: the teacher is asked, and training takes as long as in build.
        """
        from edgedistill import pipeline
        from edgedistill.adapt import adapt as make_adapted

        place = pipeline.Workspace(workspace, output.parent)
        with listening() as progress:
            made = make_adapted(bundle, loaded(recipe), place, output, progress, type)
        show(_adapted, json.loads(json.dumps(asdict(made), default=str)))

    return adapt


def loaded(recipe: str) -> Recipe:
    from edgedistill import library
    from edgedistill.recipe import load_recipe

    path = library.find("recipe", recipe)
    return load_recipe(path, library.shown(path))


def listening() -> AbstractContextManager[Progress]:
    from edgedistill import console

    quiet, terminal = click.get_current_context().obj.quiet, sys.stderr.isatty()
    return console.listening(quiet=quiet, terminal=terminal, write=partial(click.echo, err=True))


def _make(show: Show) -> Callable[..., None]:
    @click.argument("old", type=click.Path(path_type=Path))
    @click.argument("new", type=click.Path(path_type=Path))
    @click.option(
        "-o", "--output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        required=True, help="The update file, for example v2.edup.",
    )  # fmt: skip
    @click.option(
        "--samples", type=click.IntRange(0), default=SAMPLES, show_default=True,
        help="So many prompts with the new bundle's answers, for apply --check.",
    )  # fmt: skip
    def make(old: Path, new: Path, output: Path, samples: int) -> None:
        """Write what turns the bundle OLD into the bundle NEW.

        Keep a copy of what you ship: a build writes dist/<recipe>-<target> anew. The new model is
        run once for each sample (--samples 0: never).
        """
        from edgedistill import update

        made = update.make(old, new, output, update.ask, samples)
        show(_made, json.loads(json.dumps(asdict(made), default=str)))

    return make


def _apply(show: Show) -> Callable[..., None]:
    @click.argument("bundle", type=click.Path(path_type=Path))
    @click.argument("file", type=click.Path(path_type=Path))
    @click.option("--sha256", metavar="HEX", help="Refuse an update file of another sha256.")
    @click.option("--check", is_flag=True, help="Ask the new bundle the sample prompts first.")
    def apply(bundle: Path, file: Path, sha256: str | None, check: bool) -> None:
        """Turn BUNDLE into the new one of the update FILE, byte for byte, or leave it.

        BUNDLE is replaced in place, and only once the new one is complete. With --check (needs the
        extra "runtime") one answer that differs from the update's leaves it as it is, exit code 3.
        """
        from edgedistill import update

        done = update.apply(bundle, file, sha256, update.compare if check else None)
        show(_applied, json.loads(json.dumps(asdict(done), default=str)))

    return apply


def _alone(value: Any) -> RenderableType:
    from rich.text import Text

    size = f"{value['bytes'] / 1e6:.1f} MB, {value['type']}, rank {value['rank']}"
    return Text(f"made {value['file']}: {size}; load it with --lora beside the base model")


def _adapted(value: Any) -> RenderableType:
    from rich.text import Text

    return Text(f"made {value['folder']}; next: edgedistill update make OLD {value['folder']}")


def _made(value: Any) -> RenderableType:
    from rich.text import Text

    return Text(
        f"made {value['file']}: {value['bytes'] / 1e6:.1f} MB; {value['kept']} files kept, "
        f"{value['added']} added, {value['patched']} patched; {value['samples']} samples\n"
        f"sha256 {value['sha256']}"
    )


def _applied(value: Any) -> RenderableType:
    from rich.text import Text

    if not value["changed"]:
        return Text(f"{value['folder']} is the new bundle already")
    asked = "" if value["same"] is None else f"; {value['same']} of {value['samples']} samples same"
    return Text(f"{value['folder']} is now {value['new'][:16]}{asked}")
