"""A comparison as text: the cells of its table, Markdown and CSV. Each takes a Compared as JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.differences import ALIKE, BETTER, UNTOLD, WORSE
from edgedistill.figures import COLUMNS, FAULTS, FIGURES, SHARES
from edgedistill.report.units import NBSP, duration, megabytes, percent

Json = Mapping[str, Any]
BEST, BUSY, BASELINE = "★", "busy: no measure", "baseline"
TIMES = "\u00d7"
ACROSS = 6  # results that fit beside each other on a page
NUMBER = re.compile(r"(?<=[\d★]) (?=to |[★▲▼=?])|(?<=\d to) (?=[-\d])")
MARKS = {BETTER: "▲", WORSE: "▼", ALIKE: "=", UNTOLD: "?"}
STATES = {True: "holds", False: "does not hold", None: "cannot be told"}
BY_DIFFERENCE = "judged by the interval of the ratio or difference, not by those of the figures"
COUNTED = ("share",)  # units of figures that are counted, and not spread by processes
SCALES = {"bytes": ("MB", 1e-6), "share": ("%", 1e2)}  # of a figure's unit: the one shown
CSV_HEADER = (
    "result", "model", "sha256", "device", "fingerprint", "made", "busy", "figure", "unit",
    "value", "low", "high", "best", "against", "against_kind", "against_low", "against_high",
    "verdict",
)  # fmt: skip


def columns(value: Json) -> list[str]:
    """The figures of the table that at least one result has; of what is wrong with answers those
    that are not 0 for all."""
    held = {name: [row["figures"][name]["value"] for row in value["rows"] if name in row["figures"]]
            for name in COLUMNS}  # fmt: skip
    return [name for name in COLUMNS if any(held[name]) or (held[name] and name not in FAULTS)]


def headers(value: Json, first: Sequence[str] = ()) -> list[list[str]]:
    """Of each column of the table its lines: a label, and the unit of all its figures; `first` are
    the figures that stand before the others."""
    return [["result"], *(_header(value, name) for name in _ordered(value, first))]


def _ordered(value: Json, first: Sequence[str]) -> list[str]:
    held = columns(value)
    return [*(name for name in first if name in held), *(n for n in held if n not in first)]


def _header(value: Json, name: str) -> list[str]:
    label, space, percentile = FIGURES[name].label.rpartition(" p")
    unit = _scale(value, name)[0]
    return [label, f"p{percentile}, {unit}"] if space else [percentile, unit]


def cells(value: Json, row: Json, first: Sequence[str] = ()) -> list[list[str]]:
    """Of each column its lines, in the order of `headers`."""
    result = [row["name"]]
    result += [BASELINE] if row["name"] == value["baseline"] else []
    result += [BUSY] if row["busy"] else []
    result += [row["model"]] if row["model"] != row["name"] else []
    figures = (_cell(value, row, name) for name in _ordered(value, first))
    return [[*result, _device(value, row)], *figures]


def _device(value: Json, row: Json) -> str:
    """Its processor; two kinds of machine with the same one are told apart by fingerprint."""
    same = {each["fingerprint"] for each in value["rows"] if each["device"] == row["device"]}
    if len(same) == 1:
        return str(row["device"])
    threads = "" if row["threads"] is None else f", {row['threads']} threads"
    return f"{row['device']} ({str(row['fingerprint'])[:6]}{threads})"


def _scale(value: Json, name: str) -> tuple[str, float]:
    """The unit of a column, and how many of it make one of the figure's own."""
    unit = FIGURES[name].unit
    if unit == "s":
        found = (row["figures"][name]["value"] for row in value["rows"] if name in row["figures"])
        return ("ms", 1e3) if max(found) < 1 else ("s", 1.0)
    return SCALES.get(unit, (unit, 1.0))


def _cell(value: Json, row: Json, name: str) -> list[str]:
    figure, (_, scale) = row["figures"].get(name), _scale(value, name)
    if figure is None:
        return ["-"]
    number = _digits(figure["value"] * scale)
    lines = [f"{number} {BEST}" if name in row["best"] else number, *_spread(figure, scale)]
    against = row["against"].get(name)
    return lines if against is None else [*lines, *_told(against)]


def _spread(figure: Json, scale: float) -> list[str]:
    """The interval in one line, or no line where both its ends are written alike."""
    if figure["low"] is None or figure["high"] is None:
        return ["unbounded"]
    if figure["unit"] not in COUNTED and figure["high"] - figure["value"] > figure["value"]:
        return ["unknown"]
    low, high = (_digits(figure[name] * scale) for name in ("low", "high"))
    return [] if low == high else [f"{low} to {high}"]


def _told(against: Json) -> list[str]:
    """A difference from the baseline: a ratio, or points of a share."""
    mark = MARKS[against["verdict"]]
    if against["value"] is None:
        return [mark]
    numbers = [against[name] for name in ("value", "low", "high")]
    if against["kind"] == "ratio":
        ratio, low, high = (f"{number:.3f}" for number in numbers)
        return [f"{TIMES}{ratio} {mark}", *([f"{low} to {high}"] if low != high else [])]
    points, low, high = (f"{100 * number:+.1f}" for number in numbers)
    return [f"{points} {mark}", *([f"{low} to {high}"] if low != high else [])]


def _digits(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def amount(value: float, unit: str) -> str:
    """A figure with its unit."""
    if unit == "s":
        return duration(value)
    if unit == "bytes":
        return megabytes(value)
    return percent(value) if unit == "share" else f"{value:.1f} {unit}"


def in_one_unit(values: Sequence[float], unit: str) -> list[str]:
    """Figures that are held against each other: in the same unit, and with as many digits, four at
    least, as tell apart those that differ."""
    if unit == "s":
        shown, scale = ("ms", 1e3) if max(map(abs, values)) < 1 else ("s", 1.0)
    else:
        shown, scale = SCALES.get(unit, (unit, 1.0))
    for digits in range(4, 15):
        texts = [f"{value * scale:.{digits}g} {shown}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def conditions(value: Json) -> list[str]:
    """One line a condition and result."""
    ignored = ", intervals ignored" if value["ignore_intervals"] else ""
    return [
        f"{each['condition']}: {STATES[each['holds']]} for {each['result']}: {each['said']}"
        f"{ignored}"
        for each in value["judged"]
    ]


def legend(value: Json) -> str:
    """What the marks of the table mean; "" where it has none."""
    shown = {name for row in value["rows"] for name in row["best"]} & set(columns(value))
    parts = [f"{BEST} better than every other (timings: of the same device)"] if shown else []
    if value["baseline"] is not None:
        parts.append(
            f"against {value['baseline']}: ▲ better and ▼ worse, = neither, ? cannot be told "
            "(another device, a bundle, or other work disturbed one of the two)"
        )
    return "; ".join([*parts, BY_DIFFERENCE]) if parts else ""


def caption(value: Json) -> str:
    """What was asked, and how it was judged."""
    if value["token_mix"] is None:
        return "without prompts"
    mix = value["token_mix"]
    check = "" if value["check"] is None else f", check {value['check'].get('kind')}"
    return f"{mix['prompts']} prompts of {mix['source']}{check}"


def markdown(value: Json) -> str:
    """A table for a pull request or a README: a column for each result, or of many a line."""
    table = [headers(value), *(cells(value, row) for row in value["rows"])]
    if len(value["rows"]) <= ACROSS:
        titles, *results = table
        figures = [[", ".join(title)] for title in titles[1:]]
        by_figure = zip(figures, *(result[1:] for result in results), strict=True)
        table = [[[""], *(result[0] for result in results)], *map(list, by_figure)]
    head, *rows = table
    rule = _line([[""]] + [["---:"]] * (len(head) - 1)).replace("|  |", "| --- |", 1)
    notes = [*conditions(value), *(f"note: {note}" for note in value["notes"]), caption(value)]
    notes += filter(None, [legend(value)])
    return "\n".join(
        [_line(head), rule, *map(_line, rows), "", *(f"- {_escaped(note)}" for note in notes)]
    )


def _line(lines: Sequence[Sequence[str]]) -> str:
    """Cells of several lines each: the first large, a figure's parts not torn apart."""
    return f"| {' | '.join(map(_cell_text, lines))} |"


def _cell_text(lines: Sequence[str]) -> str:
    first, *more = (_escaped(line) for line in lines)
    figures = [NUMBER.sub(NBSP, line) for line in (first, *more)]
    return "<br>".join([figures[0], *(f"<sub>{line}</sub>" for line in figures[1:])])


def _escaped(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def as_csv(value: Json) -> str:
    """One line for each figure of each result; shares 0..1, times in seconds."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in value["rows"]:
        facts = [row["name"], *(row[name] for name in CSV_HEADER[1:7])]
        for name, figure in row["figures"].items():
            against = row["against"].get(name) or {}
            difference = [against.get(k) for k in ("value", "kind", "low", "high", "verdict")]
            measured = [figure[key] for key in ("unit", "value", "low", "high")]
            writer.writerow([*facts, name, *measured, name in row["best"], *difference])
    return buffer.getvalue().rstrip("\n")


def has_shares(value: Json) -> bool:
    """Whether any result says how often its answers are right."""
    return any(name in row["figures"] for row in value["rows"] for name in SHARES)
