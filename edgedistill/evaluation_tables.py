"""How evaluations are shown on a terminal; each function takes the plain data of `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from edgedistill.console import size
from edgedistill.retention import cells, headers
from edgedistill.tables import table_of

Json = Mapping[str, Any]


def evaluation(value: Json) -> RenderableType:
    """The scores of one model."""
    model, settings = value["model"], value["settings"]
    table = table_of("task", "documents", "examples", "metric", "score")
    for task in value["tasks"]:
        for place, (metric, score) in enumerate(task["scores"].items()):
            count = f"{len(task['members'])} tasks" if task["members"] else len(task["rows"])
            first = [escape(task["name"]), str(count), str(task["num_fewshot"])]
            table.add_row(*(first if not place else ["", "", ""]), metric, _amount(score))
    how = [model["runtime"] or "completions made elsewhere"]
    how += [size(model["bytes"])] if model["bytes"] else []
    room = settings.get("context_tokens")  # completions from elsewhere have none
    how += [f"{room} tokens of context"] if room else []
    how += ["by its chat template"] if settings["chat"] else []
    how += [f"the first {settings['limit']} of each task"] if settings["limit"] else []
    how += [f"programs held by {', '.join(settings['sandbox'])}"] if "sandbox" in settings else []
    notes = [Text(f"note: {note}", style="yellow") for note in value["notes"]]
    return Group(Text(f"{model['name']}: {', '.join(how)}"), table, *notes)


def _amount(score: Json) -> str:
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
    return f"{score['value']:.4f}{error}" + (
        "" if score["higher_is_better"] else " (less is better)"
    )


def retention(value: Json) -> RenderableType:
    """The retention table."""
    table = table_of(*map(escape, headers(value)))
    for row in value["rows"]:
        table.add_row(*map(escape, cells(row)))
    said = Text("score ± standard error, then retention with its 95 % interval", style="dim")
    notes = [Text(f"note: {note}", style="yellow") for note in value["notes"]]
    return Group(table, said, *notes)
