"""A figure over time, or over commits."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from edgedistill import comparison_text
from edgedistill.figures import FIGURES
from edgedistill.report.plots import PAPER, legend, set_height
from edgedistill.report.series import LEGEND, columns_of, look, shortened

Json = Mapping[str, Any]
DAY = 86400  # seconds
MANY = 12  # commits that are named


def draw_history(figure: Figure, report: Json, narrow: bool) -> None:
    """`report` is a History as JSON, its commits in order where it is by commit."""
    names = [_name(series) for series in report["series"]]
    columns, room = columns_of([f"{name}, busy" for name in names], narrow)
    names = shortened(names, room - len(", busy"))
    kinds = sum(len({point["busy"] for point in s["points"]}) for s in report["series"])
    set_height(figure, 300 + LEGEND * math.ceil(kinds / columns))
    axes = figure.subplots()
    commits = report["commits"]
    at = _seconds if commits is None else lambda point: float(commits.index(point["commit"]))
    for place, (series, name) in enumerate(zip(report["series"], names, strict=True)):
        _line(axes, series, place, name, at)
    if commits is None:
        _date_axis(axes, report, 2 if narrow else 5)
    else:
        _commit_axis(axes, commits, 6 if narrow else MANY)
    unit = report["unit"]
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: comparison_text.amount(value, unit))
    )
    axes.set_ylabel(FIGURES[report["figure"]].label)
    axes.margins(0.06, 0.12)
    axes.grid(True)
    axes.set_axisbelow(True)
    legend(figure, axes, columns)


def _name(series: Json) -> str:
    return ", ".join(filter(None, (series["model"], series["device"], series["apart"])))


def _line(axes: Axes, series: Json, place: int, name: str, at: Callable[[Json], float]) -> None:
    """Sittings on a busy machine are hollow and not joined to the others."""
    colour, marker, dashes = look(place)
    for busy in (False, True):
        points = sorted((p for p in series["points"] if p["busy"] is busy), key=at)
        if not points:
            continue
        spread = [[_aside(point, "low") for point in points], [_aside(p, "high") for p in points]]
        axes.errorbar(
            [at(point) for point in points],
            [point["value"] for point in points], yerr=spread, marker=marker, color=colour,
            markerfacecolor=PAPER if busy else colour, linestyle="none" if busy else dashes,
            capsize=3, elinewidth=1.2, label=f"{name}, busy" if busy else name,
        )  # fmt: skip


def _date_axis(axes: Axes, report: Json, ticks: int) -> None:
    """Days by their name where there are some of them, and else times of the day."""
    made = [_seconds(point) for series in report["series"] for point in series["points"]]
    days = (max(made, default=0.0) - min(made, default=0.0)) / DAY
    written = "%Y-%m-%d" if days > ticks else "%m-%d %H:%M"
    step = MultipleLocator(DAY * math.ceil(days / ticks)) if days > ticks else MaxNLocator(ticks)
    axes.xaxis.set_major_locator(step)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _date(value, written)))


def _commit_axis(axes: Axes, commits: Sequence[str], many: int) -> None:
    """Each by its short hash, or of many every so-many-th and the last."""
    step = math.ceil(len(commits) / many)
    shown = sorted({*range(len(commits) - 1, -1, -step)})
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    style = turned if len(shown) > many // 2 else {}
    axes.set_xticks(shown, [commits[place] for place in shown], **style)
    axes.set_xlim(-0.5, len(commits) - 0.5)
    axes.set_xlabel("commits in order; + with changes on top")


def _seconds(point: Json) -> float:
    """Since 1970."""
    return datetime.datetime.fromisoformat(point["made"]).timestamp()


def _date(seconds: float, written: str) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(written)


def _aside(point: Json, bound: str) -> float:
    """How far a bound is from the value; 0 where it is not known."""
    return 0.0 if point[bound] is None else abs(point["value"] - point[bound])
