"""How a result's likeness, and what a judge said, are shown: each takes what `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgedistill.slices import standing_out
from edgedistill.tables import interval, line

Json = Mapping[str, Any]
CUT = 300  # characters of a text that is shown
LISTED = 5  # IDs in a line
WORST = 3


def likeness(value: Json, worst: int = WORST) -> list[RenderableType]:
    """Its lines, and so many of the worst answers. A result of an older edgedistill has few."""
    parts: list[RenderableType] = []
    for name, label, text in (
        ("agreement", "the teacher's answer", "given to {} of the prompts"),
        ("gold", "the reference", "given to {} of the prompts"),
        ("teacher_gold", "the reference, by the teacher", "given to {} of them"),
    ):
        if value.get(name):
            parts.append(line(label, text.format(interval(value[name]))))
    rows = value["rows"]
    parts += [line("refusals", text) for text in _refusals(value, rows)]
    parts += [line("drift", text) for text in _drift(value, rows)]
    parts += [line("slice", text) for text in standing_out(value.get("slices") or ())]
    listed = value.get("worst") or []
    by_id = {row["id"]: row for row in rows}
    if listed and worst:
        parts.append(Text(f"\nthe worst {min(worst, len(listed))} of {len(listed)}", style="bold"))
        parts += [_answer(by_id[name]) for name in listed[:worst]]
    return parts


def _refusals(value: Json, rows: Sequence[Json]) -> list[str]:
    """Nothing where there is none."""
    lines = []
    if (share := value.get("refusals")) and share["value"]:
        ids = _listed([row["id"] for row in rows if row.get("refuses")])
        lines.append(f"{interval(share)} of the answers refuse ({ids})")
    if share := value.get("regressions"):
        ids = _listed([row["id"] for row in value["refused"] if row["answers"]])
        lines.append(
            f"{interval(share)} of the prompts that the teacher refuses are answered"
            + (f" ({ids})" if ids else "")
        )
    return lines


def _drift(value: Json, rows: Sequence[Json]) -> list[str]:
    if value.get("drift_left_out"):
        return [f"not measured: {value['drift_left_out']}"]
    if not (share := value.get("drift")):
        return []
    text = (
        f"{interval(share)} of the answers assert what neither the prompt nor the teacher's "
        f"answer does, {value['drift_per_answer']:.2f} an answer"
    )
    if floor := value.get("drift_floor"):
        text += (
            f"; of the teacher's against the reference {100 * floor['value']:.1f} %, "
            f"{floor['per_answer']:.2f} an answer"
        )
    ids = _listed([row["id"] for row in rows if row.get("drifts")])
    return [f"{text} ({ids})" if ids else text]


def _answer(row: Json) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    wrong = ", wrong by the reference" if row.get("gold") is False else ""
    table.add_row(escape(row["id"]), f"not the teacher's{wrong}" if "same" in row else "wrong")
    before = f"({len(row['history'])} messages before) " if row.get("history") else ""
    table.add_row("  prompt", escape(before + _cut(row["prompt"])))
    for name, key in (("teacher", "teacher"), ("answer", "answer"), ("reference", "reference")):
        if key in row:
            table.add_row(f"  {name}", escape(_cut(row[key])))
    if asserts := row.get("asserts"):
        table.add_row("  asserts", escape(", ".join(each["text"] for each in asserts)))
    return table


def judged(value: Json) -> RenderableType:
    """What a judge said of results."""
    judge, calls = value["judge"], value["calls"]
    mix = value["token_mix"]
    title = f"judged by {judge['model']}: {mix.get('source')}"
    parts: list[RenderableType] = [Text(f"\n{title}", style="bold")]
    for each in value["grades"]:
        parts.append(line(f"grade of {each['result']}", _grade(each)))
    for each in value["drift"]:
        said = interval(each["share"]) if each["share"] else "not known"
        label = f"drift of {each['result']}"
        parts.append(line(label, f"{said} of the answers add a fact to the teacher's"))
    for each in value["pairs"]:
        parts += [line(label, text) for label, text in _pairs(each)]
    parts.append(
        line("calls", f"{calls['asked']} made, {calls['kept']} known from before, "
              f"{calls['failed']} failed, {calls['unreadable']} verdicts that cannot be read")
    )  # fmt: skip
    parts += [Text(f"note: {note}", style="yellow") for note in value["notes"]]
    return Group(*parts)


def _grade(each: Json) -> str:
    mean = each["mean"]
    if mean is None:
        return "not known: no grade could be read"
    text = f"{mean['value']:.2f} of 10 ({mean['low']:.2f} to {mean['high']:.2f}, n={mean['n']})"
    if gold := each["gold"]:
        text += f"; 6 or more goes with a right answer in {interval(gold['accuracy'])}"
        text += _kappa(gold["kappa"])
    return text


def _pairs(each: Json) -> list[tuple[str, str]]:
    text = f"{each['win']} won, {each['tie']} tied, {each['loss']} lost"
    if each["difference"]:
        low, high = (100 * each["difference"][end] for end in ("low", "high"))
        value = 100 * each["difference"]["value"]
        text += f"; won less lost {value:+.1f} points ({low:+.1f} to {high:+.1f})"
        text += f", sign test p {each['p_value']:.2g}"
    lines = [(f"{each['first']} against {each['second']}", text)]
    if position := each["position"]:
        told = f"the order changes {interval(position['flips'])} of the verdicts"
        if to_first := position["to_first"]:
            told += f"; what is shown first is preferred in {interval(to_first)}, and half is fair"
        lines.append(("position", told))
    if gold := each["gold"]:
        told = "no pair has one right and one wrong answer"
        if gold["accuracy"]:
            told = (
                f"of {gold['pairs']} pairs with one right and one wrong answer, the right one wins "
                f"in {interval(gold['accuracy'])}; in a single order in {interval(gold['single'])}"
            )
        lines.append(("against gold", told + _kappa(gold["kappa"])))
    return lines


def _kappa(kappa: Json | None) -> str:
    if kappa is None:
        return ""
    return f"; kappa {kappa['value']:.2f} ({kappa['low']:.2f} to {kappa['high']:.2f})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= CUT else f"{plain[:CUT]}…"
