"""How sweeps and learning curves are drawn: on pages of their own, and in a build's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from edgedistill.report.plots import (
    GATE,
    INK,
    MUTED,
    PAPER,
    STUDENT,
    TEACHER,
    Chart,
    add,
    legend,
    percent_axis,
    set_height,
)
from edgedistill.report.templates import css, environment

Json = Mapping[str, Any]
DRAWN = 100  # points of a fitted curve
ASIDE = 1.05  # each seed's mark beside their mean


def sweep_page(sweep: Json) -> str:
    """One HTML document; `sweep` is a Sweep as JSON."""
    title = f"{sweep['recipe']}: learning rate, rank and epochs"
    return _page(title, draw_tuning({"sweep": sweep}), sweep=sweep, curve=None)


def curve_page(curve: Json) -> str:
    """One HTML document; `curve` is a LearningCurve as JSON."""
    title = f"{curve['recipe']}: what more traces would buy"
    return _page(title, draw_tuning({"learning_curve": curve}), sweep=None, curve=curve)


def _page(title: str, charts: Mapping[str, Chart], **shown: Json | None) -> str:
    template = environment().get_template("tuning.html.jinja")
    return template.render(title=title, charts=charts, css=css(), **shown)


def draw_tuning(report: Json) -> dict[str, Chart]:
    """The charts of the sweep and the learning curve that `report` holds."""
    charts: dict[str, Chart] = {}
    if report.get("sweep"):
        add(charts, "sweep", _sweep, report, "Agreement and NLL of each trial over its steps")
    if report.get("learning_curve"):
        add(charts, "learning_curve", _curve, report, "Agreement against training rows")
    return charts


def _sweep(figure: Figure, report: Json, narrow: bool) -> None:
    sweep = report["sweep"]
    set_height(figure, 420)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for place, trial in enumerate(sweep["trials"]):
        if trial["exams"]:
            for axes, name in ((upper, "agreement"), (lower, "nll")):
                _trial(axes, trial, name, str(place + 1), best=place == sweep["winner"])
    percent_axis(upper, "y")
    upper.set_ylabel("agreement, validation")
    lower.set_ylabel("NLL, nats a token")
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))
    for axes in (upper, lower):
        axes.margins(0.08, 0.14)
        axes.grid(True)
        axes.set_axisbelow(True)


def _trial(axes: Axes, trial: Json, name: str, label: str, *, best: bool) -> None:
    steps, values = zip(*((exam["step"], exam[name]) for exam in trial["exams"]), strict=True)
    colour = STUDENT if best else TEACHER if trial["own"] else MUTED
    axes.plot(
        steps, values, "o--" if trial["own"] else "o-", color=colour, markersize=4,
        linewidth=2.2 if best else 1.1, zorder=3 if best else 2,
    )  # fmt: skip
    end = "*" if best else "x" if trial["stopped_at"] is not None else "o"
    axes.plot(steps[-1], values[-1], end, color=colour, markersize=15 if best else 7, zorder=4)
    axes.annotate(
        label, (steps[-1], values[-1]), xytext=(9, -4), textcoords="offset points", color=colour,
        fontsize=10.5, fontweight="bold" if best else "normal",
    )  # fmt: skip


def _curve(figure: Figure, report: Json, narrow: bool) -> None:
    curve = report["learning_curve"]
    points, forecast = curve["points"], curve["forecast"]
    set_height(figure, 300)
    axes = figure.subplots()
    rows = [point["rows"] for point in points]
    if not forecast["refused"]:
        _forecast(axes, forecast, rows[0])
    if curve["seeds"] > 1:
        for point in points:
            each = point["each"]
            aside = [point["rows"] * ASIDE] * len(each)
            axes.plot(aside, each, ".", color=MUTED, markersize=5, zorder=2)
    _measured(axes, rows, [p["agreement"] for p in points], "o", STUDENT, "measured")
    axes.set_xscale("log")
    shown = rows if forecast["refused"] else [*rows, forecast["rows"]]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    percent_axis(axes, "y")
    axes.set_xlabel("training rows")
    axes.set_ylabel("agreement, validation")
    axes.margins(0.08, 0.1)
    axes.grid(True)
    axes.set_axisbelow(True)
    legend(figure, axes, 2 if narrow else 3)


def _forecast(axes: Axes, forecast: Json, first: int) -> None:
    """The fitted curve, and where it leads."""
    last, (a, b, c) = forecast["rows"], (forecast[name] for name in "abc")
    along = [first * (last / first) ** (i / (DRAWN - 1)) for i in range(DRAWN)]
    axes.plot(
        along, [1 - a - b * n**-c for n in along], "--", color=INK, linewidth=1.2,
        label=f"error = {forecast['form']}", zorder=1,
    )  # fmt: skip
    _measured(axes, [last], [forecast["agreement"]], "D", GATE, "forecast")


def _measured(
    axes: Axes, rows: Sequence[int], shares: Sequence[Json], marker: str, colour: str, label: str
) -> None:
    values = [share["value"] for share in shares]
    spread = [
        [max(0.0, share["value"] - share["low"]) for share in shares],
        [max(0.0, share["high"] - share["value"]) for share in shares],
    ]
    axes.errorbar(
        rows, values, yerr=spread, fmt=marker, color=colour, markersize=7, elinewidth=1.6,
        markerfacecolor=PAPER if label == "forecast" else colour, capsize=3, label=label, zorder=3,
    )  # fmt: skip
