"""The command `bench`: of a build, as one of its stages, of any model file, or of a server."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedistill.cli_options import (
    GIVEN,
    TRAINING,
    names,
    refuse,
    target_option,
    workspace_option,
)
from edgedistill.cli_update import Show, listening, loaded
from edgedistill.library import DEFAULT_RECIPE

if TYPE_CHECKING:
    from edgedistill.devices.address import Address
    from edgedistill.progress import Progress
    from edgedistill.prompts import Prompts
    from edgedistill.recipe import Recipe
    from edgedistill.result_file import Result
    from edgedistill.streaming import Stop

Stage = Callable[[str, Sequence[str], Path, int | None, bool], None]
OF_FILE = ("threads", "depths", "device", "keep_on_device", "runner", "turns")
OF_URL = ("model_id", "api_key_env", "asked_as", "streams", "max_calls")
NEEDS_MODEL = (
    "prompts", "sample", "system", "max_tokens", "repeats", "out", "worst", *OF_FILE, *OF_URL,
)  # fmt: skip
NOTHING_KEPT = "nothing of this sitting is kept"
OF_PROMPTS = ("system", "max_tokens", "sample", "worst")


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show, stage: Stage) -> None:
    """Add the command; `stage(recipe, targets, workspace, processes, scaled_down)` is the one of a
    build."""
    bench = _bench(show, stage)
    for option in reversed([recipe_option, workspace_option, target_option, *TRAINING, *OWN]):
        bench = option(bench)
    bench = click.argument("models", nargs=-1, metavar="[MODEL]...")(bench)
    cli.command("bench")(common(bench))


def counts(least: int) -> Callable[..., tuple[int, ...] | None]:
    """A callback that reads whole numbers with commas between them, each at least `least`; those
    given twice count once."""

    def read(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> tuple[int, ...] | None:
        if value is None:
            return None
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is no list of whole numbers, such as 1,2,4"
            ) from None
        if min(found) < least:
            raise click.BadParameter(f"{min(found)} is below {least}")
        return tuple(dict.fromkeys(found))

    return read


recipe_option = click.option(
    "--recipe", metavar="NAME_OR_PATH", default=DEFAULT_RECIPE,
    show_default=f"{DEFAULT_RECIPE}, and none for a MODEL", shell_complete=names("recipe"),
    help="Recipe by name, folder or file.",
)  # fmt: skip
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
        "--threads", metavar="N[,N...]", callback=counts(1),
        help="A file: by default one a core; several numbers: pp512 and tg128 with each.",
    ),
    click.option(
        "--depths", metavar="N[,N...]", callback=counts(0), default="0", show_default=True,
        help="A file: pp512 and tg128 behind so many tokens of context, too.",
    ),
    click.option(
        "--device", metavar="ADDRESS", default="local", show_default=True,
        help="A file: where it is measured: ssh://[user@]host[:port], adb://[serial] or "
        "emulated://phone.",
    ),
    click.option(
        "--keep-on-device", is_flag=True,
        help="--device: leave the model and the runner there, for the next time.",
    ),
    click.option(
        "--runner", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="--device: a runner that you compiled for it, instead of ours.",
    ),
    click.option(
        "--repeats", metavar="N", type=click.IntRange(2, 100), default=3, show_default=True,
        help="MODEL: in so many processes, one behind the other (several MODELs: for the prompts); "
        "a URL: passes over the prompts.",
    ),
    click.option(
        "--turns", metavar="N", type=click.IntRange(10, 1000), default=20, show_default=True,
        help="Several files: pp512 and tg128 in so many processes of each, in turn.",
    ),
    click.option(
        "-o", "--out", metavar="FILE|FOLDER", type=click.Path(path_type=Path),
        help="MODEL: keep the result as JSON, with the prompts and answers in it; several: a "
        "folder, with a file for each.",
    ),
    click.option(
        "--worst", metavar="N", type=click.IntRange(0), default=3, show_default=True,
        help="MODEL: show so many of the answers that are least like the teacher's.",
    ),
    click.option("--model", "model_id", metavar="ID", help="URL: which model is asked there."),
    click.option(
        "--api-key-env", metavar="NAME", help="URL: the environment variable that holds its key."
    ),
    click.option(
        "--as", "asked_as", type=click.Choice(("teacher", "student")), default="teacher",
        show_default=True, help="URL with --recipe: asked as the recipe asks which of them.",
    ),
    click.option(
        "--streams", metavar="N[,N...]", callback=counts(1), default="1", show_default=True,
        help="URL: so many prompts at once; several numbers are measured one behind the other.",
    ),
    click.option(
        "--max-calls", metavar="N", type=click.IntRange(1), help="URL: make no more calls than N."
    ),
)  # fmt: skip


def _bench(show: Show, stage: Stage) -> Callable[..., None]:
    def bench(
        models: Sequence[str], recipe: str, workspace: Path, targets: Sequence[str],
        processes: int | None, scaled_down: bool, **own: Any,
    ) -> None:  # fmt: skip
        """Measure a build on held-out prompts, or any MODEL: a GGUF file, an ONNX model folder, a
        bundle with one of them, or the URL of a server (https://HOST/v1, with --model).

        Without MODEL what a build needs is reused from the workspace, or made first. Of a MODEL
        speed is measured, and with --prompts or --recipe how it answers these prompts: how long
        that takes, and how often it gives the teacher's answer and their reference by the recipe's
        check. Of a recipe the held-out prompts are asked; for a MODEL none is the default.

        Several files are measured in turn, so that compare tells smaller differences between them
        than between two sittings.
        """
        context = click.get_current_context()
        if not models:
            refuse(context, NEEDS_MODEL, "a MODEL, and none is given")
            stage(recipe, targets, workspace, processes, scaled_down)
            return
        given = recipe if context.get_parameter_source("recipe") is GIVEN else None
        kept_in = _files_of(models, own["out"])
        _require_writable(workspace)
        made = _made_folder(own["out"]) if len(models) > 1 else None
        measure = _of_server if any(map(_is_url, models)) else _of_files
        try:
            results, stopped = measure(context, models, given, workspace, own)
        except BaseException:
            _leave_no_empty(made)
            raise
        _show_and_keep(results, kept_in, workspace, own["worst"], show)
        if stopped is not None:
            context.obj.interrupted = _kept_of_server(own["out"])
            raise stopped

    return bench


def _kept_of_server(out: Path | None) -> str:
    """Of a sitting that was interrupted: no call is made again by itself."""
    if out is None:
        return "what was answered is in the result above; the same command asks all again"
    return f"what was answered is in {out}; the same command asks all again and writes over it"


def _require_writable(workspace: Path) -> None:
    from edgedistill.artifacts import require_writable

    require_writable(workspace)


def _made_folder(out: Path | None) -> Path | None:
    """The folder of results where it had to be made; None where it was there before. Results can
    be written to it either way."""
    if out is None:
        return None
    there = out.is_dir()
    _require_writable(out)
    return None if there else out


def _leave_no_empty(made: Path | None) -> None:
    """Remove the folder of results that was made for a sitting that gave none."""
    if made is not None:
        with contextlib.suppress(OSError):  # it has something in it
            made.rmdir()


def _is_url(model: str) -> bool:
    from edgedistill.server_prompt import is_url

    return is_url(model)


def _files_of(models: Sequence[str], out: Path | None) -> list[Path] | None:
    """Where each result is kept: one in the file `out`, several in the folder `out`.

    Raises:
        click.UsageError: they cannot be.
    """
    if out is None:
        return None
    if not out.parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {out.parent}; make it first")
    if len(models) == 1:
        if out.is_dir():
            raise click.UsageError(f"--out: {out} is a folder, and one MODEL gives one file")
        return [out]
    if out.is_file():
        raise click.UsageError(f"--out: {out} is a file, and several MODELs give a folder of them")
    if out.suffix == ".json":
        raise click.UsageError(f"--out: several MODELs give a folder of files, not one {out.name}")
    names: list[str] = []
    for model in map(Path, models):
        names.append(_free(model.name if model.is_dir() else model.stem, names))
    return [out / f"{name}.json" for name in names]


def _free(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number behind it; a file system may know no capitals."""
    used, found = {each.casefold() for each in taken}, name
    for number in itertools.count(2):
        if found.casefold() not in used:
            break
        found = f"{name}-{number}"
    return found


def _show_and_keep(
    results: Sequence[Result], out: Sequence[Path] | None, workspace: Path, worst: int, show: Show
) -> None:
    from edgedistill import result_tables
    from edgedistill.history import STORE, remember
    from edgedistill.result_file import write_result

    for result, file in zip(results, out or (), strict=out is not None):
        write_result(result, file)
    for result in results:
        remember(result, workspace)
    shown = json.loads(json.dumps([result.to_json() for result in results]))
    show(partial(result_tables.sittings, worst=worst), shown if len(shown) > 1 else shown[0])
    settings = click.get_current_context().obj
    if not settings.quiet and not settings.json:
        for file in out or ():
            click.echo(f"kept: {file}", err=True)
        click.echo(f"remembered in {workspace / STORE}", err=True)


def _of_files(
    context: click.Context, models: Sequence[str], recipe: str | None, workspace: Path,
    own: dict[str, Any],
) -> tuple[list[Result], None]:  # fmt: skip
    from edgedistill.devices import place_at
    from edgedistill.devices.address import LOCAL
    from edgedistill.model_prompt import asked_model
    from edgedistill.rates import More
    from edgedistill.sitting import Plan, sit_in_turn

    refuse(context, OF_URL, "a URL (http:// or https://), and this is a file")
    if recipe is None and own["prompts"] is None:
        refuse(context, OF_PROMPTS, "answers, and needs --prompts or --recipe")
    held = None if recipe is None else _held(recipe, workspace)
    student = None if held is None else held.student
    asked = [asked_model(Path(m), student, own["system"], own["max_tokens"]) for m in models]
    at = _address(context, own, held)
    if len(asked) == 1:
        refuse(context, ("turns",), "several files, and this is one")
    elif at.scheme != LOCAL:
        raise click.UsageError(
            "several MODELs are measured in turn on this machine alone: give one"
        )
    with listening() as progress:
        prompts = _prompts(held, workspace, own, progress)
        check = None if held is None else held.check
        threads: tuple[int, ...] = own["threads"] or ()
        one = threads[0] if len(threads) == 1 else None
        more = More(tuple(filter(None, own["depths"])), threads if one is None else ())
        plan = Plan(
            own["repeats"], turns=own["turns"], threads=one, more=more, prompts=prompts, check=check
        )
        context.obj.interrupted = NOTHING_KEPT
        with place_at(at, asked[0].file, own["runner"], own["keep_on_device"], progress) as place:
            return sit_in_turn(asked, plan, progress, place), None


def _address(context: click.Context, own: dict[str, Any], recipe: Recipe | None) -> Address:
    from edgedistill.devices.address import EMULATED, LOCAL, read_address

    at = read_address(own["device"])
    if at.scheme in (LOCAL, EMULATED):
        refuse(context, ("keep_on_device", "runner"), "a --device with ssh:// or adb://")
    if at.scheme == EMULATED:
        refuse(context, ("threads", "depths"), "a device that has a speed, and this is emulated")
        if recipe is None and own["prompts"] is None:
            raise click.UsageError("an emulated device has no speed: give --prompts or --recipe")
    return at


def _of_server(
    context: click.Context, models: Sequence[str], recipe: str | None, workspace: Path,
    own: dict[str, Any],
) -> tuple[list[Result], Stop | None]:  # fmt: skip
    from edgedistill.server_prompt import asked_server
    from edgedistill.server_sitting import ServerPlan, sit_at

    if len(models) > 1:
        raise click.UsageError("a server is measured alone: files take turns, URLs do not")
    refuse(context, OF_FILE, "a file, and this is a URL")
    url = models[0]
    if own["model_id"] is None:
        raise click.UsageError("a URL needs --model ID: which model is asked there")
    if recipe is None:
        refuse(context, ("asked_as",), "a URL with --recipe, and none is given")
    held = None if recipe is None else _held(recipe, workspace)
    asked = asked_server(
        url, own["model_id"], own["api_key_env"], held, own["asked_as"], own["system"],
        own["max_tokens"],
    )  # fmt: skip
    with listening() as progress:
        prompts = _prompts(held, workspace, own, progress)
        if prompts is None:
            raise click.UsageError("a URL is measured on prompts: give --prompts or --recipe")
        plan = ServerPlan(
            prompts, own["repeats"], own["streams"], check=None if held is None else held.check,
            max_calls=own["max_calls"],
        )  # fmt: skip
        context.obj.interrupted = NOTHING_KEPT
        sitting = sit_at(asked, plan, progress)
    return [sitting.result], sitting.stopped


def _held(recipe: str, workspace: Path) -> Recipe:
    from edgedistill.workspace import keeping

    return keeping(loaded(recipe), workspace)


def _prompts(
    recipe: Recipe | None, workspace: Path, own: dict[str, Any], progress: Progress
) -> Prompts | None:
    from edgedistill.prompts import held_out_of, prompts_of

    if own["prompts"] is not None:
        return prompts_of(own["prompts"], own["sample"])
    return None if recipe is None else held_out_of(recipe, own["sample"], workspace, progress)
