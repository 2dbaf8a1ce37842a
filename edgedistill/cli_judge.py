"""The command `judge`: a language model grades and compares the answers in results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedistill.cli_options import refuse, workspace_option
from edgedistill.cli_update import Show, listening, loaded
from edgedistill.errors import UsageError

if TYPE_CHECKING:
    from edgedistill.judge import Desk
    from edgedistill.judging import Judge
    from edgedistill.recipe import Recipe, Teacher

ASKS = ("grade", "pairs", "drift")
MAX_TOKENS = 512


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show) -> None:
    """Add the command to the command line's group."""
    command = _judge(show)
    for option in reversed(OPTIONS):
        command = option(command)
    cli.command("judge")(common(command))


OPTIONS = (
    click.argument(
        "results", metavar="RESULT...", nargs=-1, required=True, type=click.Path(path_type=Path)
    ),
    click.option(
        "--judge", "place", metavar="URL|FILE",
        help="Who judges: a server (https://HOST/v1, with --model), or a GGUF file, served here.",
    ),
    click.option("--model", metavar="ID", help="Which model is asked there."),
    click.option(
        "--api-key-env", metavar="NAME", help="The environment variable that holds the judge's key."
    ),
    click.option(
        "--recipe", metavar="NAME_OR_PATH",
        help="Take the judge and the rubric from its check, which is of kind judge.",
    ),
    click.option("--rubric", metavar="TEXT", help="What counts on this task, in a few sentences."),
    click.option(
        "--ask", "asks", type=click.Choice(ASKS), multiple=True, default=("grade", "pairs"),
        show_default=True, help="What is asked; repeatable.",
    ),
    click.option(
        "--teacher", is_flag=True,
        help="Compare each with the teacher's answers, not with the first result.",
    ),
    click.option("--reasons", is_flag=True, help="Let it say why before it decides."),
    click.option("--sample", metavar="N", type=click.IntRange(1), help="Only so many answers."),
    click.option(
        "--max-tokens", metavar="N", type=click.IntRange(1), default=MAX_TOKENS, show_default=True,
        help="Of a verdict, at most.",
    ),
    click.option(
        "--max-calls", metavar="N", type=click.IntRange(0), help="Make no more calls than N."
    ),
    click.option("--retry-failed", is_flag=True, help="Ask again what failed before."),
    workspace_option,
    click.option(
        "-o", "--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="Keep what was found as JSON.",
    ),
)  # fmt: skip


def _judge(show: Show) -> Callable[..., None]:
    def judge(
        results: Sequence[Path], asks: Sequence[str], teacher: bool, sample: int | None,
        workspace: Path, out: Path | None, **own: Any,
    ) -> None:  # fmt: skip
        """Have a language model judge the answers in results (files of bench MODEL --out).

        Each answer is graded from 1 to 10. Pairs are asked about in both orders, and won only where
        both say so: a result against the teacher's answers, or several against the first. What was
        answered is kept, and not asked again.
        """
        from edgedistill import likeness_table
        from edgedistill.artifacts import require_writable, write_json
        from edgedistill.judge import judge as ask
        from edgedistill.result_set import read_all

        if out is not None and not out.parent.is_dir():
            raise click.UsageError(f"--out: there is no folder {out.parent}; make it first")
        named, desk = read_all(results), _desk(workspace, own)
        require_writable(workspace)
        with listening() as progress:
            asked = tuple(dict.fromkeys(asks))
            found = ask(named, desk, asked, progress, with_teacher=teacher, sample=sample)
        value = json.loads(json.dumps(found))
        if out is not None:
            write_json(out, value)
        show(likeness_table.judged, value)

    return judge


def _desk(workspace: Path, own: dict[str, Any]) -> Desk:
    from dataclasses import replace

    from edgedistill.judge import Desk
    from edgedistill.judging import JUDGE, JUDGE_OF_CHECK, Judge

    context = click.get_current_context()
    own_judge = None if own["recipe"] is None else _of_recipe(loaded(own["recipe"]))
    if own["place"] is not None:
        rubric = "" if own_judge is None else own_judge.rubric
        judge, named = Judge(_asked(context, own), rubric), JUDGE
    elif own_judge is not None:
        refuse(context, ("model", "api_key_env", "max_tokens"), "--judge, and none is given")
        judge, named = own_judge, JUDGE_OF_CHECK
    else:
        raise click.UsageError("give --judge URL|FILE, or --recipe with a check of kind judge")
    if own["rubric"] is not None:
        judge = replace(judge, rubric=own["rubric"])
    judge = replace(judge, reasons=own["reasons"])
    return Desk(
        judge, workspace, max_calls=own["max_calls"], retry_failed=own["retry_failed"], named=named
    )


def _of_recipe(recipe: Recipe) -> Judge:
    from edgedistill.check_specs import JudgeCheck
    from edgedistill.judging import judge_of

    if not isinstance(recipe.check, JudgeCheck):
        raise UsageError(
            f"the check of {recipe.name} is {recipe.check.kind}, and names no judge",
            hint="give --judge URL|FILE without --recipe, and --rubric TEXT",
        )
    return judge_of(recipe.check)


def _asked(context: click.Context, own: dict[str, Any]) -> Teacher:
    from pydantic import ValidationError

    from edgedistill.judging import asked_at
    from edgedistill.recipe import Sampling
    from edgedistill.server_prompt import is_url, require_url

    place, model = own["place"], own["model"]
    if is_url(place):
        require_url(place)
        if model is None:
            raise click.UsageError("a URL needs --model ID: which model is asked there")
    elif not Path(place).is_file():
        raise UsageError(
            "the judge is no URL (http:// or https://), and there is no such file", where=place
        )
    else:
        refuse(context, ("api_key_env",), "a URL (http:// or https://), and the judge is a file")
    sampling = Sampling(max_tokens=own["max_tokens"])
    try:
        return asked_at(place, model or Path(place).stem, own["api_key_env"], sampling)
    except ValidationError as error:  # the URL is known to be one
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(f"--api-key-env: {said}") from error
