"""Results side by side, and a figure over time, on pages of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgedistill import comparison_text
from edgedistill.figures import FIGURES
from edgedistill.measures import percentile
from edgedistill.report.chain_chart import chained, draw_chains
from edgedistill.report.history_chart import draw_history
from edgedistill.report.plots import (
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
from edgedistill.report.series import DASHES, LEGEND, at_least_tall, columns_of, look, shortened
from edgedistill.report.templates import css, environment

Json = Mapping[str, Any]
DRAWN = 200  # points of a distribution
LARGEST = 500.0  # a marker's area, in points squared
LEADING = ("agreement", "gold")  # columns right behind the name
LATENCY = "end_to_end_p50"
DISTRIBUTIONS = {"end_to_end": "time to the whole answer", "inter_token": "time between tokens"}


def comparison_page(compared: Json, distributions: Json, histories: Sequence[Json] = ()) -> str:
    """One HTML document.

    Args:
        compared: a Compared as JSON.
        distributions: by row name, by figure of DISTRIBUTIONS, the values as they came, in seconds.
        histories: each a History as JSON, of a figure of the results' models.
    """
    template = environment().get_template("comparison.html.jinja")
    rows = [comparison_text.cells(compared, row, LEADING) for row in compared["rows"]]
    charts = draw_comparison({**compared, "distributions": distributions})
    courses = {}
    for each in histories:
        label = FIGURES[each["figure"]].label
        add(charts, f"history-{each['figure']}", draw_history, each, f"{label} over sittings")
        courses[f"history-{each['figure']}"] = label
    return template.render(
        compared=compared,
        caption=comparison_text.caption(compared),
        legend=comparison_text.legend(compared),
        headers=comparison_text.headers(compared, LEADING),
        rows=rows,
        conditions=comparison_text.conditions(compared),
        charts=charts,
        courses=courses,
        css=css(),
    )


def history_page(history: Json) -> str:
    """One HTML document; `history` is a History as JSON."""
    charts: dict[str, Chart] = {}
    label = FIGURES[history["figure"]].label
    over = "time" if history["commits"] is None else "commits"
    add(charts, "history", draw_history, history, f"{label} over {over}")
    template = environment().get_template("history.html.jinja")
    shown = comparison_text.amount
    return template.render(
        history=history, label=label, over=over, charts=charts, shown=shown, css=css()
    )


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
    if chains := chained(report["rows"]):
        what = "Agreement along the fidelity chain, and the KL divergence of each of its steps"
        add(charts, "chain", draw_chains, {"rows": chains}, what)
    return charts


def _front(figure: Figure, report: Json, narrow: bool) -> None:
    """Each device has a front of its own: a time holds on its device alone."""
    rows = report["rows"]
    columns, room = columns_of([row["name"] for row in rows], narrow)
    names = shortened([row["name"] for row in rows], room)
    set_height(figure, 360 + LEGEND * math.ceil(len(rows) / columns))
    axes = figure.subplots()
    sizes = [(row["figures"].get("bytes") or {"value": 0})["value"] for row in rows]  # 0: a server
    largest = max(*sizes, 1)
    for place, row in enumerate(rows):
        colour, marker, _ = look(place)
        axes.scatter(
            *_place(row), s=LARGEST * sizes[place] / largest + 30, marker=marker,
            edgecolors=colour, facecolors=PAPER if row["busy"] else colour, alpha=0.75,
            linewidths=2, zorder=3, clip_on=False,
        )  # fmt: skip
        axes.plot(
            [], [], marker, color=colour, markerfacecolor=PAPER if row["busy"] else colour,
            markersize=8, label=names[place],
        )  # fmt: skip
    for number, best in enumerate(fronts(rows)):
        axes.plot(
            *zip(*map(_place, best), strict=True) if best else ([], []), color=MUTED, linewidth=1.2,
            linestyle=DASHES[number % 4], zorder=1,
        )  # fmt: skip
    axes.margins(0.12, 0.18)
    at_least_tall(axes)
    percent_axis(axes, "y")
    time_axis(axes, [_place(row)[0] for row in rows], narrow)
    axes.set_xlabel("time to the whole answer, p50")
    axes.set_ylabel("agreement with the teacher")
    legend(figure, axes, columns)


def _place(row: Json) -> tuple[float, float]:
    return row["figures"][LATENCY]["value"], row["figures"]["agreement"]["value"]


def fronts(rows: Sequence[Json]) -> list[Sequence[Json]]:
    """Of each device its Pareto front; empty where all of its results are busy. A fingerprint is of
    a kind of machine, and far servers have none: `device` tells where one is."""
    devices: dict[tuple[str, str | None], list[Json]] = {}
    for row in rows:
        devices.setdefault((row["device"], row["fingerprint"]), []).append(row)
    return [pareto([row for row in held if not row["busy"]]) for held in devices.values()]


def pareto(rows: Sequence[Json]) -> list[Json]:
    """Those that no other is both faster and right more often than, the fastest first."""
    best: list[Json] = []
    for row in sorted(rows, key=lambda row: (_place(row)[0], -_place(row)[1])):
        if not best or _place(row)[1] > _place(best[-1])[1]:
            best.append(row)
    return best


def _distribution(figure: Figure, report: Json, narrow: bool) -> None:
    timed = report["times"]
    columns, room = columns_of(list(timed), narrow)
    names = dict(zip(timed, shortened(list(timed), room), strict=True))
    set_height(figure, 260 + LEGEND * math.ceil(len(timed) / columns))
    axes = figure.subplots()
    every: list[float] = []
    for place, row in enumerate(report["rows"]):
        if times := timed.get(row["name"]):
            colour, _, dashes = look(place)
            cumulative(axes, _thinned(times), colour, dashes, names[row["name"]])
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
    rows = [row for row in report["rows"] if {"agreement", "gold"} & row["figures"].keys()]
    set_height(figure, 76 + 44 * len(rows))
    axes = figure.subplots()
    looks = (("agreement", "o", 0.0, STUDENT, True), ("gold", "s", 0.28, TEACHER, False))
    for name, marker, shift, colour, filled in looks:
        known = [(i, row["figures"][name]) for i, row in enumerate(rows) if name in row["figures"]]
        intervals(axes, known, name, marker, shift, colour, filled)
    names = shortened([row["name"] for row in rows], 20 if narrow else 32)
    axes.set_yticks(range(len(rows)), names, color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.5)
    percent_axis(axes, "x")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("prompts")
    legend(figure, axes, 2)
