"""The commands that read results again: `compare`, several side by side, `history`, and `predict`,
what they say of other devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedistill.cli_options import names, refuse, workspace_option
from edgedistill.cli_update import Show
from edgedistill.errors import EdgedistillError, MissingTool, UsageError
from edgedistill.printable import printable

if TYPE_CHECKING:
    from edgedistill.compare import Compared
    from edgedistill.result_set import Named

FORMATS = ("table", "markdown", "json", "csv")
MISSED, UNTOLD = 3, 1  # exit codes
html_option = click.option(
    "--html", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it, too, on one page that opens without a network.",
)  # fmt: skip


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show) -> None:
    """Add these commands to the command line's group."""
    cli.command("compare")(common(_compare(show)))
    cli.command("history")(common(_history(show)))
    cli.command("predict")(common(_predict(show)))


def _compare(show: Show) -> Callable[..., None]:
    @click.argument(
        "results", metavar="RESULT...", nargs=-1, required=True, type=click.Path(path_type=Path)
    )
    @click.option(
        "--baseline", metavar="FILE", type=click.Path(path_type=Path),
        help="The result that the others are held against.",
    )  # fmt: skip
    @click.option(
        "--fail-if", metavar="CONDITION", multiple=True,
        help='Exit with 3 where it holds, as "tg128 < 0.97 * baseline". Repeatable.',
    )  # fmt: skip
    @click.option("--ignore-intervals", is_flag=True, help="Let noise fire a --fail-if, too.")
    @click.option(
        "--format", "style", type=click.Choice(FORMATS), default="table", show_default=True,
        help="How it is printed.",
    )  # fmt: skip
    @html_option
    @click.option(
        "--workspace", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
        help="With --html: also how these models did in the sittings that it remembers.",
    )  # fmt: skip
    def compare(
        results: Sequence[Path], baseline: Path | None, fail_if: Sequence[str],
        ignore_intervals: bool, style: str, html: Path | None, workspace: Path | None,
    ) -> None:  # fmt: skip
        """Lay results side by side: files of bench MODEL --out, bundles, or folders of them.

        A figure is marked as the best, and a --fail-if holds, only beyond the intervals. A
        condition that cannot be told (a busy machine, another device) ends with exit code 1.
        """
        from edgedistill.compare import compare as lay_out
        from edgedistill.compare import read_for_comparison

        _require_folder(html)
        context = click.get_current_context()
        if context.obj.json and style != "json":
            refuse(context, ("style",), "output without --json")
        if workspace is not None and html is None:
            raise UsageError("--workspace is for --html: it draws what the workspace remembers")
        named, base, aside = read_for_comparison(results, baseline)
        found = lay_out(named, base, fail_if, ignore_intervals=ignore_intervals, notes=aside)
        if html is not None:
            _draw(found, named, html, workspace)
        _printed(found, style, show)
        settings = click.get_current_context().obj
        if html is not None and not settings.quiet and not settings.json:
            click.echo(f"drawn: {html}", err=True)
        _exit(found, said=style != "csv")

    return compare


def _history(show: Show) -> Callable[..., None]:
    @click.argument("figure", required=False, default="tg128")
    @workspace_option
    @click.option(
        "--by", type=click.Choice(("time", "commit")), default="time", show_default=True,
        help="Against when it was measured, or the commit that the workspace was at.",
    )  # fmt: skip
    @html_option
    def history(figure: str, workspace: Path, by: str, html: Path | None) -> None:
        """Show a FIGURE of every sitting of bench MODEL over time (by default tg128).

        One line for each model and device, and for each runtime, number of threads, token mix,
        check and max_tokens that the figure hangs on.
        """
        from edgedistill import result_tables
        from edgedistill.history import read_history

        _require_folder(html)
        value = read_history(workspace, figure, by_commit=by == "commit").to_json()
        if html is not None:
            _write(html, lambda pages: pages.history_page(value))
        show(result_tables.history, value)

    return history


def _predict(show: Show) -> Callable[..., None]:
    @click.argument(
        "results", metavar="RESULT...", nargs=-1, required=True, type=click.Path(path_type=Path)
    )
    @click.option(
        "--target", "targets", metavar="NAME_OR_PATH", multiple=True,
        shell_complete=names("target"), help="A target with a roofline; repeatable.",
    )  # fmt: skip
    def predict(results: Sequence[Path], targets: Sequence[str]) -> None:
        """Say how fast measured files should be on other devices: on --target by its profile, and,
        where one file was measured on several, how far such predictions are off.
        """
        from edgedistill import library, result_tables
        from edgedistill.reached import predict as foretell
        from edgedistill.result_set import read_all
        from edgedistill.target import load_target

        devices = [load_target(library.find("target", name)) for name in targets]
        found = foretell(read_all(results), devices)
        show(result_tables.predictions, found.to_json())

    return predict


def _require_folder(file: Path | None) -> None:
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"--html: there is no folder {file.parent}; make it first")


def _draw(found: Compared, named: Sequence[Named], html: Path, workspace: Path | None) -> None:
    from edgedistill.compare import courses, distributions

    value, times = found.to_json(), distributions(named)
    past = [] if workspace is None else [each.to_json() for each in courses(found, workspace)]
    _write(html, lambda pages: pages.comparison_page(value, times, past))


def _write(html: Path, page: Callable[[Any], str]) -> None:
    from edgedistill.artifacts import write_atomic

    try:
        from edgedistill.report import comparison
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise MissingTool(
            "the package matplotlib is not installed", where="--html",
            hint='pip install "edgedistill[report]"',
        ) from error  # fmt: skip
    write_atomic(html, page(comparison).encode())


def _printed(found: Compared, style: str, show: Show) -> None:
    from edgedistill import comparison_text, result_tables

    value = found.to_json()
    if style == "table" or click.get_current_context().obj.json:
        show(result_tables.compared, value)
    elif style == "json":
        click.echo(json.dumps(value, indent=2))
    else:
        written = comparison_text.markdown if style == "markdown" else comparison_text.as_csv
        click.echo(printable(written(value)))


def _exit(found: Compared, *, said: bool) -> None:
    """Behind the result, so that a CI keeps it: 3 where a condition holds, 1 where one cannot be
    told and none holds. `said`: the result names those that hold already."""
    held = [each for each in found.judged if each.holds]
    lines = [f"{each.condition}: {each.result}: {each.said}" for each in held]
    if lines:
        if said:
            count = len({each.condition for each in held})
            lines = [f"{count} condition{' holds' if count == 1 else 's hold'}"]
        click.echo("\n".join(f"error: {line}" for line in lines), err=True)
        click.get_current_context().exit(MISSED)
    untold = [each for each in found.judged if each.holds is None]
    if untold:
        if said:
            count = len({each.condition for each in untold})
            what = f"{count} condition{'' if count == 1 else 's'} cannot be told, see above"
            click.echo(f"error: {what}", err=True)
            click.get_current_context().exit(UNTOLD)
        first = untold[0]
        error = EdgedistillError(
            f"{first.condition}: cannot be told for {first.result}: {first.said}",
            hint="measure it again there, undisturbed and with all figures",
        )
        click.echo(f"error: {error}", err=True)
        click.get_current_context().exit(UNTOLD)
