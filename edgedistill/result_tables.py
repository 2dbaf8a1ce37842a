"""How results of `bench MODEL` are shown: each function takes what `--json` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgedistill import comparison_text, likeness_table
from edgedistill.console import size
from edgedistill.history import sparkline
from edgedistill.report.units import duration as seconds
from edgedistill.tables import line, table_of

Row = Mapping[str, Any]
UNIT = re.compile(r"\s")  # before it; a no-break space, too
OF_P99 = 100  # values from which it is more than the largest of them
ENDLESS = 10_000  # columns
NAME_WIDTH = 20  # of a result whose column is narrower
BETWEEN = 3  # columns of the table
HOLDS = {True: "bold red", False: "green", None: "yellow"}  # a condition of --fail-if


def sittings(value: Row | list[Row], worst: int = likeness_table.WORST) -> RenderableType:
    """One sitting, or those of several models that took turns."""
    rows = value if isinstance(value, list) else [value]
    return Group(*(sitting(row, worst) for row in rows))


def sitting(value: Row, worst: int = likeness_table.WORST) -> RenderableType:
    """What one sitting measured of a model file, or of a server, with so many of the worst
    answers."""
    model, device = value["model"], value["device"]
    title = f"\n{model['name']} at {device['address']}"
    if model["bytes"] is not None:
        title = f"\n{model['name']}, {model['bytes'] / 1e6:.1f} MB, on {_device(device)}"
    busy = (": busy", "bold red") if value["load"]["busy"] else ""
    parts: list[RenderableType] = [Text.assemble((title, "bold"), busy)]
    if facts := _facts(value):
        parts.append(Text(facts, style="dim"))
    if value["figures"]:
        parts.append(_figures(value["figures"]))
    parts += [Text(text, style="dim") for text in _of_table(value)]
    if value["roofline"]:
        parts.append(_roofline(value["roofline"]))
    if value["likeness"]:
        parts += likeness_table.likeness(value["likeness"], worst)
    parts += notes_of(value["notes"])
    return Group(*parts)


def _device(device: Row) -> str:
    """Its processor, and where it is when that is elsewhere."""
    at = device["address"]
    return str(device["cpu"]) if at == "local" else f"{device['cpu']} ({at})"


def _facts(value: Row) -> str:
    """What the device is, in one line; of a server nothing is known."""
    device, threads = value["device"], value["settings"].get("threads")
    if device["cpu"] is None or threads is None:
        return ""
    parts = [f"{_counted(threads, 'thread')} of {_counted(device['physical_cores'], 'core')}"]
    runtime = dict(device.get("runtime") or {})
    runtime.pop("kernels", None)  # a line of its own length, for --json
    name, more = runtime.pop("name", ""), " ".join(f"{k} {v}" for k, v in runtime.items() if v)
    parts += [size(device["memory_bytes"]), device["os"]]
    return ", ".join([*map(str, parts), f"{name} ({more})" if more else str(name)])


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _of_table(value: Row) -> list[str]:
    """How to read the figures, where they are few."""
    said = []
    if any(_is_too_few(name, each) for name, each in value["figures"].items()):
        said.append(
            f"p99 of fewer than {OF_P99} values a process is in the result (--json), not here"
        )
    for noun in ("processes", "passes"):
        if value["figures"] and value["settings"].get(noun) == 2:
            but = (
                " (those of pp512 and tg128 are of --turns)"
                if value["settings"].get("turns")
                else ""
            )
            said.append(f"two {noun}, so the intervals are wide{but}: raise --repeats")
    return said


def _is_too_few(name: str, figure: Row) -> bool:
    """Whether its name says more than it is: of few values p99 is about the largest."""
    return name.partition("@")[0].endswith("_p99") and min(map(len, figure["groups"])) < OF_P99


def _roofline(roof: Row) -> Text:
    return line(
        "ceilings",
        f"{roof['bandwidth_gb_s']:.1f} GB/s, of which decoding reaches {roof['decode_share']:.0%}; "
        f"{roof['compute_gflops']:.0f} GFLOP/s in float32, of which prefill reaches "
        f"{roof['prefill_share']:.0%}",
    )


def notes_of(notes: Sequence[str]) -> list[Text]:
    return [Text(f"note: {note}", style="yellow") for note in notes]


def _figures(figures: Row) -> Table:
    table = table_of("", "figure", "95 % of other sittings", "of values")
    for name, each in figures.items():
        if _is_too_few(name, each):
            continue
        count = str(sum(map(len, each["groups"])))
        count += f", {len(each['outliers'])} far off" if each["outliers"] else ""
        table.add_row(name, _amount(each["value"], each["unit"]), _span(each), count)
    return table


def _span(figure: Row) -> str:
    """Where other sittings are expected, the unit once where both ends have the same."""
    if figure["low"] is None:
        return "not known"
    if figure["high"] - figure["value"] > figure["value"]:
        return "unknown: too few repeats"
    low, high = (_amount(figure[end], figure["unit"]) for end in ("low", "high"))
    (least, of_low), (_, of_high) = (UNIT.split(text, maxsplit=1) for text in (low, high))
    once = of_low == of_high and not any(map(str.isdigit, of_high))  # "min 5 s" is no unit
    return f"{least if once else low} to {high}"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return seconds(value)
    return size(int(value)) if unit == "bytes" else f"{value:.1f} {unit}"


def compared(value: Row) -> RenderableType:
    """Results side by side; what else there is to say below."""
    notes = notes_of(value["notes"])
    found = zip(value["judged"], comparison_text.conditions(value), strict=True)
    judged = [Text(line, style=HOLDS[each["holds"]]) for each, line in found]
    legend = comparison_text.legend(value)
    said = [Text(legend, style="dim")] if legend else []
    caption = Text(comparison_text.caption(value))
    return Group(caption, _SideBySide(value), *said, *notes, *judged)


class _SideBySide:
    """Results as lines where all their figures fit, and else as columns, so many as fit beside each
    other: rich cuts numbers, and leaves out columns, that it has no room for."""

    def __init__(self, value: Row) -> None:
        self._head = comparison_text.headers(value)
        self._rows = [comparison_text.cells(value, row) for row in value["rows"]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = table_of(*map("\n".join, self._head))
        for row in self._rows:
            table.add_row(*(escape("\n".join(cell)) for cell in row), end_section=True)
        endless = options.update(max_width=ENDLESS)
        if console.measure(table, options=endless).maximum <= options.max_width:
            yield table
        else:
            yield from self._turned(options.max_width)

    def _turned(self, width: int) -> Iterator[Table]:
        labels = [", ".join(lines) for lines in self._head[1:]]
        taken = max(map(len, labels), default=0)
        chunk: list[list[list[str]]] = []
        left = width - taken
        for row in self._rows:
            needed = _width(row) + BETWEEN
            if chunk and needed > left:
                yield _columns(labels, chunk)
                chunk, left = [], width - taken
            chunk.append(row)
            left -= needed
        yield _columns(labels, chunk)


def _width(row: Sequence[Sequence[str]]) -> int:
    """Of a result's column: its figures whole, its names in lines."""
    name, *figures = row
    return max(
        min(NAME_WIDTH, max(map(len, name))), *(len(line) for cell in figures for line in cell)
    )


def _columns(labels: Sequence[str], rows: Sequence[Sequence[Sequence[str]]]) -> Table:
    table = table_of("", *(escape("\n".join(row[0])) for row in rows))
    for column, row in zip(table.columns[1:], rows, strict=True):
        column.min_width = _width(row)
        column.max_width = column.min_width
    for place, label in enumerate(labels, start=1):
        cells = (escape("\n".join(row[place])) for row in rows)
        table.add_row(label, *cells, end_section=True)
    return table


def history(value: Row) -> RenderableType:
    """A figure over time: one line for each model and device, and settings that tell two apart."""
    table = table_of("model", "device", value["figure"], "sittings", "first", "last", "last made")
    for series in value["series"]:
        points = series["points"]
        if (commits := value["commits"]) is not None:
            points = sorted(points, key=lambda point: commits.index(point["commit"]))
        first, last = (_point(points[i], value) for i in (0, -1))
        busy = sum(point["busy"] for point in points)
        table.add_row(
            escape(series["model"]),
            escape("\n".join(filter(None, (series["device"], series["apart"])))),
            sparkline([point["value"] for point in points]),
            f"{len(points)}, {busy} busy" if busy else str(len(points)),
            first,
            last,
            series["points"][-1]["made"][:10],
        )
    torn = f"{value['torn']} torn lines of {value['store']} were left out"
    outside = f"{value['outside']} sittings without a commit were left out"
    notes = [*([torn] if value["torn"] else []), *([outside] if value["outside"] else [])]
    return Group(table, *notes_of(notes))


def _point(point: Row, value: Row) -> str:
    """Its figure, and by commit also that."""
    commit = f"\n{point['commit']}" if value["commits"] is not None else ""
    return f"{comparison_text.amount(point['value'], value['unit'])}{commit}"


def predictions(value: Row) -> RenderableType:
    """What was reached, what is predicted elsewhere, and how far such predictions were off."""
    table = table_of("result", "memory", "decode", "reached", "float32", "prefill", "reached")
    for each in value["reached"]:
        table.add_row(
            escape(each["result"]) + ("\nbusy" if each["busy"] else ""),
            f"{each['bandwidth_gb_s']:.1f} GB/s",
            f"{each['decode']:.1f} tokens/s",
            f"{_least(each)}{each['decode_share']:.0%}",
            f"{each['compute_gflops']:.0f} GFLOP/s",
            f"{each['prefill']:.0f} tokens/s",
            f"{_least(each)}{each['prefill_share']:.0%}",
        )
    parts: list[RenderableType] = [table]
    for name, rows in (("predicted for", value["targets"]), ("checked on", value["checked"])):
        if rows:
            parts.append(_predicted(name, rows))
    if value["worst_decode_error"] is not None:
        worst = (value["worst_decode_error"], value["worst_prefill_error"])
        said = "largest error: decode {:+.0%}, prefill {:+.0%}".format(*worst)
        parts.append(Text(said, style="bold"))
    return Group(*parts, *notes_of(value["notes"]))


def _predicted(name: str, rows: Sequence[Row]) -> Table:
    table = table_of("model", "by its share at", name, "decode", "off", "prefill", "off")
    for each in rows:
        table.add_row(
            escape(each["model"]),
            escape(each["by"]),
            escape(each["on"]),
            f"{each['decode']:.1f} tokens/s",
            _off(each, each["decode_error"]),
            f"{each['prefill']:.0f} tokens/s",
            _off(each, each["prefill_error"]),
        )
    return table


def _least(each: Row) -> str:
    """Other work took from what was reached."""
    return "at least " if each["busy"] else ""


def _off(each: Row, error: float | None) -> str:
    if error is None:
        return "busy" if each["busy"] else "not measured"
    return f"{error:+.0%}"
