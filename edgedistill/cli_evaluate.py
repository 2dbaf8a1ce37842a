"""The commands of public benchmarks: `evaluate` a model, and lay out its `retention`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgedistill.cli_options import workspace_option
from edgedistill.cli_update import Show, listening
from edgedistill.printable import printable

FORMATS = ("table", "markdown", "json", "csv")


def add_to(cli: click.Group, common: Callable[[Any], Any], show: Show) -> None:
    """Add these commands to the command line's group."""
    evaluate = _evaluate(show)
    for option in reversed([workspace_option, *OWN]):
        evaluate = option(evaluate)
    model = click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
    cli.command("evaluate")(common(model(evaluate)))
    cli.command("retention")(common(_retention(show)))


def _names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{value!r} has an empty name; write a,b")
    return names


OWN = (
    click.option(
        "--tasks", metavar="TASK[,TASK...]", callback=_names, required=True,
        help="lm-eval's task by name, a task file (.yaml), or humaneval:FILE.jsonl.",
    ),
    click.option(
        "--limit", metavar="N", type=click.IntRange(1), help="The first N documents of each task."
    ),
    click.option(
        "--num-fewshot", metavar="N", type=click.IntRange(0),
        help="Examples in a prompt, instead of what the task says (its 0 stays).",
    ),
    click.option("--chat", is_flag=True, help="Ask by the model's own chat template."),
    click.option("--system", metavar="TEXT", help="With --chat: the system message."),
    click.option(
        "--context", metavar="N", type=click.IntRange(64),
        help="Tokens of request and answer; by default 2048, or what the model has learnt.",
    ),
    click.option("--threads", metavar="N", type=click.IntRange(1), help="By default one a core."),
    click.option(
        "--seconds", metavar="N", type=click.FloatRange(0, min_open=True), default=10.0,
        show_default=True, help="humaneval: for one program.",
    ),
    click.option(
        "-o", "--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="Keep the result as JSON.",
    ),
)  # fmt: skip


def _evaluate(show: Show) -> Callable[..., None]:
    def evaluate(
        model: Path, tasks: Sequence[str], out: Path | None, workspace: Path, seconds: float,
        **own: Any,
    ) -> None:  # fmt: skip
        """Public benchmarks on MODEL: a GGUF file, an ONNX folder, a bundle, or a checkpoint.

        Tasks are those of lm-evaluation-harness, asked on the model's own runtime; their data comes
        from the Hugging Face hub or its cache, or from files beside a task file. humaneval:FILE
        runs what the model writes in a sandbox; MODEL may then be a .jsonl file of completions.
        Answers are kept: run the same command again to go on.
        """
        from edgedistill import evaluation_tables
        from edgedistill.evaluate import Plan
        from edgedistill.evaluate import evaluate as measured
        from edgedistill.evaluate.evaluation import write_evaluation
        from edgedistill.sandbox import Limits

        _require_sense(own, out)
        with listening() as progress:
            plan = Plan(tasks, **own, limits=Limits(seconds=seconds))
            found = measured(model, plan, workspace, progress)
        if out is not None:
            write_evaluation(found, out)
        show(evaluation_tables.evaluation, found.to_json())

    return evaluate


def _require_sense(own: dict[str, Any], out: Path | None) -> None:
    if own["system"] is not None and not own["chat"]:
        raise click.UsageError("--system is for --chat, and that is not given")
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {out.parent}; make it first")
    if own["threads"] is not None:
        from edgedistill import machine
        from edgedistill.rates import require_cores

        require_cores([own["threads"]], machine.facts()["usable_cores"])


def _retention(show: Show) -> Callable[..., None]:
    @click.argument(
        "results", metavar="RESULT...", nargs=-1, required=True, type=click.Path(path_type=Path)
    )
    @click.option(
        "--teacher", metavar="FILE", type=click.Path(path_type=Path),
        help="The teacher's result, of evaluate --out, too.",
    )  # fmt: skip
    @click.option(
        "--teacher-score", "scores", metavar="TASK=SCORE[:STDERR]", multiple=True,
        help="The teacher's score as it was measured elsewhere. Repeatable.",
    )  # fmt: skip
    @click.option(
        "--teacher-parameters", "parameters", metavar="N",
        type=click.FloatRange(0, min_open=True), help="How large the teacher is, such as 7e9.",
    )  # fmt: skip
    @click.option("--teacher-name", "name", metavar="TEXT", help="How the table calls it.")
    @click.option("--metric", metavar="NAME", help="By default the first of each task.")
    @click.option(
        "--format", "style", type=click.Choice(FORMATS), default="table", show_default=True,
        help="How it is printed.",
    )  # fmt: skip
    def retention(
        results: Sequence[Path], teacher: Path | None, scores: Sequence[str],
        parameters: float | None, name: str | None, metric: str | None, style: str,
    ) -> None:  # fmt: skip
        """How much of the teacher's score students keep: RESULTs are files of evaluate --out."""
        from edgedistill import evaluation_tables
        from edgedistill.retention import as_csv, markdown
        from edgedistill.retention import retention as laid_out

        value = laid_out(results, teacher, scores, parameters, name, metric).to_json()
        if style == "table" or click.get_current_context().obj.json:
            show(evaluation_tables.retention, value)
        elif style == "json":
            click.echo(json.dumps(value, indent=2))
        else:
            click.echo(printable(markdown(value) if style == "markdown" else as_csv(value)))

    return retention
