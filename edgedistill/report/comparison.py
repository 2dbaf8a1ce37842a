"""Results side by side, and a figure over time, on pages of their own."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from edgedistill import comparison_text
from edgedistill.figures import FIGURES
from edgedistill.measures import percentile
from edgedistill.report.html import css, environment
from edgedistill.report.plots import (
    BAD,
    GATE,
    INK,
    MUTED,
    PAPER,
    STUDENT,
    TEACHER,
    Chart,
    add,
    cumulative,
    intervals,
    legend,
    percent_axis,
    set_height,
    time_axis,
)

Json = Mapping[str, Any]
COLOURS = (STUDENT, TEACHER, GATE, INK, MUTED, BAD)
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
DRAWN = 200  # points of a distribution
LARGEST = 900.0  # a marker's area, in points squared
DAY = 86400  # seconds
LEGEND = 19  # CSS pixels of one of its lines
LATENCY = "end_to_end_p50"
DISTRIBUTIONS = {"end_to_end": "time to the whole answer", "inter_token": "time between tokens"}


def comparison_page(compared: Json, distributions: Json) -> str:
    """One HTML document.

    Args:
        compared: a Compared as JSON.
        distributions: by row name, by figure of DISTRIBUTIONS, the values as they came, in seconds.
    """
    template = environment().get_template("comparison.html.jinja")
    rows = [comparison_text.cells(compared, row) for row in compared["rows"]]
    return template.render(
        compared=compared,
        caption=comparison_text.caption(compared),
        legend=comparison_text.legend(compared),
        headers=comparison_text.headers(compared),
        rows=rows,
        conditions=comparison_text.conditions(compared),
        charts=draw_comparison({**compared, "distributions": distributions}),
        css=css(),
    )


def history_page(history: Json) -> str:
    """One HTML document; `history` is a History as JSON."""
    charts: dict[str, Chart] = {}
    label = FIGURES[history["figure"]].label
    add(charts, "history", _history, history, f"{label} over time")
    template = environment().get_template("history.html.jinja")
    shown = comparison_text.amount
    return template.render(history=history, label=label, charts=charts, shown=shown, css=css())


def draw_comparison(report: Json) -> dict[str, Chart]:
    """The charts that the results have data for."""
    charts: dict[str, Chart] = {}
    placed = [row for row in report["rows"] if {LATENCY, "agreement"} <= row["figures"].keys()]
    if placed:
        add(charts, "front", _front, {"rows": placed}, "Agreement against time to the whole answer")
    for name, label in DISTRIBUTIONS.items():
        timed = {row: each[name] for row, each in report["distributions"].items() if name in each}
        if timed:
            drawn = {"times": timed, "rows": report["rows"], "label": label}
            add(charts, name, _distribution, drawn, f"Share of values within a {label}")
    if comparison_text.has_shares(report):
        add(charts, "shares", _shares, report, "Agreement and gold with 95 % intervals")
    return charts


def _look(place: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of a result; no two of the first twelve have all alike."""
    return COLOURS[place % 6], MARKERS[place % 7], DASHES[place % 4]


def _front(figure: Figure, report: Json, narrow: bool) -> None:
    """Each device has a front of its own: a time holds on its device alone."""
    rows = report["rows"]
    set_height(figure, 380)
    axes = figure.subplots()
    sizes = [
        (row["figures"].get("bytes") or {"value": 0})["value"] for row in rows
    ]  # 0: a server's
    largest = max(*sizes, 1)
    for place, row in enumerate(rows):
        colour, marker, _ = _look(place)
        at = _place(row)
        axes.scatter(
            *at, s=LARGEST * sizes[place] / largest + 30, marker=marker,
            edgecolors=colour, facecolors=PAPER if row["busy"] else colour, alpha=0.75,
            linewidths=2, zorder=3,
        )  # fmt: skip
        axes.annotate(
            row["name"], at, xytext=(0, 17), textcoords="offset points", ha="center", fontsize=9.5
        )
    for number, device in enumerate(dict.fromkeys(row["fingerprint"] for row in rows)):
        best = pareto([row for row in rows if row["fingerprint"] == device and not row["busy"]])
        axes.plot(
            *zip(*map(_place, best), strict=True) if best else ([], []), color=MUTED, linewidth=1.2,
            linestyle=DASHES[number % 4], zorder=1,
        )  # fmt: skip
    axes.margins(0.18, 0.22)
    percent_axis(axes, "y")
    time_axis(axes, [_place(row)[0] for row in rows], narrow)
    axes.set_xlabel("time to the whole answer, p50")
    axes.set_ylabel("agreement with the teacher")


def _place(row: Json) -> tuple[float, float]:
    return row["figures"][LATENCY]["value"], row["figures"]["agreement"]["value"]


def pareto(rows: Sequence[Json]) -> list[Json]:
    """Those that no other is both faster and right more often than, the fastest first."""
    best: list[Json] = []
    for row in sorted(rows, key=lambda row: (_place(row)[0], -_place(row)[1])):
        if not best or _place(row)[1] > _place(best[-1])[1]:
            best.append(row)
    return best


def _distribution(figure: Figure, report: Json, narrow: bool) -> None:
    columns = 2 if narrow else 3
    set_height(figure, 260 + LEGEND * math.ceil(len(report["times"]) / columns))
    axes = figure.subplots()
    every: list[float] = []
    for place, row in enumerate(report["rows"]):
        if times := report["times"].get(row["name"]):
            colour, _, dashes = _look(place)
            cumulative(axes, _thinned(times), colour, dashes, row["name"])
            every += times
    axes.set_ylim(0, 1.03)
    percent_axis(axes, "y")
    time_axis(axes, every, narrow)
    axes.set_xlabel(report["label"])
    axes.set_ylabel("values within it")
    legend(figure, axes, columns)


def _thinned(times: Sequence[float]) -> list[float]:
    """Sorted; of many only quantiles, the least and the largest among them."""
    if len(times) <= DRAWN:
        return sorted(times)
    return [percentile(times, place / (DRAWN - 1)) for place in range(DRAWN)]


def _shares(figure: Figure, report: Json, narrow: bool) -> None:
    rows = report["rows"]
    set_height(figure, 76 + 44 * len(rows))
    axes = figure.subplots()
    looks = (("agreement", "o", 0.0, STUDENT, True), ("gold", "s", 0.28, TEACHER, False))
    for name, marker, shift, colour, filled in looks:
        known = [(i, row["figures"][name]) for i, row in enumerate(rows) if name in row["figures"]]
        intervals(axes, known, name, marker, shift, colour, filled)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.5)
    percent_axis(axes, "x")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("prompts")
    legend(figure, axes, 2)


def _history(figure: Figure, report: Json, narrow: bool) -> None:
    kinds = sum(len({point["busy"] for point in s["points"]}) for s in report["series"])
    columns = 1 if narrow else 2
    set_height(figure, 300 + LEGEND * math.ceil(kinds / columns))
    axes = figure.subplots()
    for place, series in enumerate(report["series"]):
        _over_time(axes, series, place)
    _date_axis(axes, report, 2 if narrow else 5)
    unit = report["unit"]
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: comparison_text.amount(value, unit))
    )
    axes.set_ylabel(FIGURES[report["figure"]].label)
    axes.margins(0.06, 0.12)
    axes.grid(True)
    axes.set_axisbelow(True)
    legend(figure, axes, columns)


def _over_time(axes: Axes, series: Json, place: int) -> None:
    """Sittings on a busy machine are hollow and not joined to the others."""
    colour, marker, dashes = _look(place)
    label = f"{series['model']}, {series['device']}"
    for busy in (False, True):
        points = [point for point in series["points"] if point["busy"] is busy]
        if not points:
            continue
        spread = [[_aside(point, "low") for point in points], [_aside(p, "high") for p in points]]
        axes.errorbar(
            [_seconds(point) for point in points],
            [point["value"] for point in points], yerr=spread, marker=marker, color=colour,
            markerfacecolor=PAPER if busy else colour, linestyle="none" if busy else dashes,
            capsize=3, elinewidth=1.2, label=f"{label}, busy" if busy else label,
        )  # fmt: skip


def _date_axis(axes: Axes, report: Json, ticks: int) -> None:
    """Days by their name where there are some of them, and else times of the day."""
    made = [_seconds(point) for series in report["series"] for point in series["points"]]
    days = (max(made, default=0.0) - min(made, default=0.0)) / DAY
    written = "%Y-%m-%d" if days > ticks else "%m-%d %H:%M"
    step = MultipleLocator(DAY * math.ceil(days / ticks)) if days > ticks else MaxNLocator(ticks)
    axes.xaxis.set_major_locator(step)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _date(value, written)))


def _seconds(point: Json) -> float:
    """Since 1970."""
    return datetime.datetime.fromisoformat(point["made"]).timestamp()


def _date(seconds: float, written: str) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(written)


def _aside(point: Json, bound: str) -> float:
    """How far a bound is from the value; 0 where it is not known."""
    return 0.0 if point[bound] is None else abs(point["value"] - point[bound])
