"""The commands about this machine: `doctor`, `completion`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from edgedistill.cli_options import scaled_option, several, workspace_option

Show = Callable[[Callable[[Any], Any], Any], None]


def add_to(
    cli: click.Group, common: Callable[[Any], Any], show: Show, load: Callable[..., Any]
) -> None:
    """Add these commands to the command line's group; `load` reads a recipe and targets."""

    @cli.command()
    @common
    @workspace_option
    @several("recipe", "Also what this one needs, before anything is fetched or paid for.")
    @scaled_option
    def doctor(workspace: Path, recipes: Sequence[str], scaled_down: bool) -> None:
        """Show what this machine can do, and what to install. Exit 1 when a build cannot run."""
        from edgedistill import tables
        from edgedistill.doctor import examine
        from edgedistill.needs import AREA, needs
        from edgedistill.scaled import as_asked

        findings = examine(workspace)
        for name in recipes:
            asked, _ = as_asked(load(name, [])[0], scaled_down=scaled_down)
            area = f"{AREA} {name}" if len(recipes) > 1 else AREA
            findings += needs(asked, workspace, area)
        show(tables.findings, tables.plain(findings))
        if any(finding.state == "missing" for finding in findings):
            click.get_current_context().exit(1)

    @cli.command()
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    def completion(shell: str) -> None:
        """Print the script that completes commands and names in your shell."""
        made = get_completion_class(shell)
        assert made is not None
        click.echo(made(cli, {}, "edgedistill", "_EDGEDISTILL_COMPLETE").source())
