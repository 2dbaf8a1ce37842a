"""The report's charts as SVG text, for inlining into HTML.

Charts are drawn in stand-in colours that are replaced by the page's CSS variables, and without a
font, so that they follow the page in light, dark and print. Each is drawn twice, wide and narrow,
so that its text stays readable on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from edgedistill.report.units import duration
from edgedistill.target import is_stock

WIDE, NARROW = 660, 340  # CSS pixels
FINE = 0.08  # of an axis of shares, below which ticks are parts of a point
COLOURS = {  # stand-in: CSS variable; see report.css for the values
    "#0a0b01": "ink",
    "#0a0b02": "muted",
    "#0a0b03": "line",
    "#0a0b04": "student",
    "#0a0b05": "teacher",
    "#0a0b06": "gate",
    "#0a0b07": "paper",
    "#0a0b08": "bad",
}
INK, MUTED, LINE, STUDENT, TEACHER, GATE, PAPER, BAD = COLOURS
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgedistill",
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 72,
}
Report = Mapping[str, Any]
WHO = {  # who was timed: colour, dashes
    "teacher": (TEACHER, "--"),
    "student": (STUDENT, "-"),
    "student in process": (MUTED, ":"),
}


@dataclass(frozen=True)
class Chart:
    """One chart in both widths, SVG text, and what it shows in one sentence for screen readers."""

    wide: str
    narrow: str
    alt: str


def draw(report: Report) -> dict[str, Chart]:
    """Every chart that `report` has data for, by name."""
    charts: dict[str, Chart] = {}
    add(charts, "agreement", _agreement, report, "Agreement of each model with its 95 % interval")
    if len(report["candidates"]) > 1:
        add(
            charts,
            "candidates",
            _candidates,
            report,
            "Agreement and KLD against size",
        )
    if report["latencies"]:
        add(charts, "end_to_end", _end_to_end, report, "Share of prompts answered within a time")
        add(charts, "first_token", _first_token, report, "Time to first token: p50, p95, p99")
    if report["training"]:
        add(charts, "training", _training, report, "Training loss and validation agreement")
    if report.get("fitting"):
        add(charts, "fitting", _fitting, report, "Fitting: loss and validation agreement")
    return charts


def add(
    charts: dict[str, Chart],
    name: str,
    plot: Callable[[Figure, Report, bool], None],
    report: Report,
    alt: str,
) -> None:
    def render(width: int) -> str:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(width / 72, 1), layout="constrained")
            plot(figure, report, width == NARROW)
            return _svg(figure, f"{name}-{width}")

    charts[name] = Chart(render(WIDE), render(NARROW), alt)


def _svg(figure: Figure, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several drawings share one page, so their ids must differ.
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"font: (?:(\w+) )?([\d.]+)px [^;\"]+", _font, text)
    for stand_in, name in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r"\1", text, count=1)


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"


def set_height(figure: Figure, height: float) -> None:
    figure.set_size_inches(figure.get_figwidth(), height / 72)


def percent_axis(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis

    def written(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        return f"{value * 100:.{0 if high - low > FINE else 1}f} %"

    axis.set_major_formatter(FuncFormatter(written))


def _agreement(figure: Figure, report: Report, narrow: bool) -> None:
    rows = report["agreements"]
    set_height(figure, 60 + 52 * len(rows))
    axes = figure.subplots()
    for name, marker, shift, colour, filled in (
        ("overall", "o", 0.0, STUDENT, True),
        ("seen", "^", 0.24, MUTED, True),
        ("unseen", "v", 0.46, MUTED, False),
    ):
        known = [(i, row[name]) for i, row in enumerate(rows) if row[name] is not None]
        intervals(axes, known, name, marker, shift, colour, filled)
    for index, bound in _bars(report):
        axes.errorbar(
            bound, index, yerr=0.3, fmt="none", ecolor=GATE, elinewidth=3, capsize=0, label="gate"
        )
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.3, -0.5)
    axes.set_xlim(-0.02, 1.02)
    percent_axis(axes, "x")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("held-out prompts answered as the teacher does")
    legend(figure, axes, 2 if narrow else 4)


def intervals(
    axes: Axes,
    rows: Sequence[tuple[int, Mapping[str, float]]],
    label: str,
    marker: str,
    shift: float,
    colour: str,
    filled: bool,
) -> None:
    """Shares with their intervals: (place from the top, share) each; "overall" is drawn larger."""
    if not rows:
        return
    values = [row["value"] for _, row in rows]
    spread = [
        [max(0.0, row["value"] - row["low"]) for _, row in rows],
        [max(0.0, row["high"] - row["value"]) for _, row in rows],
    ]
    big = label == "overall"
    markers = axes.errorbar(
        values, [index + shift for index, _ in rows], xerr=spread, fmt=marker, color=colour,
        markerfacecolor=colour if filled else PAPER, markersize=8 if big else 5.5,
        elinewidth=2.2 if big else 1.1, capsize=3.5 if big else 2, label=label, zorder=3,
    )[0]  # fmt: skip
    markers.set_zorder(4)  # or the interval's line fills a hollow one, unlike in the legend


def _bars(report: Report) -> list[tuple[int, float]]:
    """Gates on agreement as (row, share): on the merged model, and on what is lost from the
    exported one to what ships. A step of an allocation's own starts elsewhere and has no bar."""
    values = {row["model"]: row["overall"]["value"] for row in report["agreements"]}
    order, gates = list(values), report["gates"]
    in_all = any(gate["name"] == "agreement_drop_in_all" for gate in gates)
    bars = []
    for gate in gates:
        if gate["name"] == "agreement_drop_in_all" or (
            not in_all and (gate["step"], gate["name"]) == ("quantize", "agreement_drop")
        ):
            row, bound = "quantized", values.get("exported", 0.0) - gate["bound"]
        elif gate["name"].endswith("agreement"):
            row, bound = "merged", gate["bound"]
        else:
            continue
        if row in order:
            bars.append((order.index(row), bound))
    return bars


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper left", ncols=columns,
        columnspacing=1.4, handletextpad=0.5, borderpad=0,
    )  # fmt: skip


def _candidates(figure: Figure, report: Report, narrow: bool) -> None:
    """Bytes against agreement, and against KLD: what a stock type of the same size would give."""
    set_height(figure, 470)
    upper, lower = figure.subplots(2, 1, sharex=True)
    rows = report["candidates"]
    for axes, field in ((upper, "agreement"), (lower, "mean_kld")):
        shown = [row for row in rows if row[field] > 0 or field == "agreement"]
        _best_stock(axes, shown, field)
        for row in shown:
            _candidate(axes, row, field)
        axes.margins(0.12, 0.2)
        axes.grid(True)
        axes.set_axisbelow(True)
    percent_axis(upper, "y")
    upper.set_ylabel("agreement on validation")
    lower.set_yscale("log")
    # The default writes powers as formulas, which STYLE leaves unread.
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.yaxis.set_minor_formatter(lambda value, _: "")
    lower.set_ylabel("mean KLD, nats a token")
    lower.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
    lower.set_xlabel("file size, MB (1 MB = 1,000,000 bytes)")


def _candidate(axes: Axes, row: Report, field: str) -> None:
    kind = "D" if row["fitted"] else ("o" if is_stock(row["format"]) else "s")
    marker = ("*" if row["chosen"] else kind) if row["passed"] else "x"
    size = 15 if row["chosen"] else 7
    at, colour = (row["bytes"] / 1e6, row[field]), STUDENT if row["passed"] else BAD
    axes.plot(*at, marker, color=colour, markersize=size, markeredgewidth=2, zorder=3)
    axes.annotate(
        row["format"], at, xytext=(0, 11 if row["chosen"] else 8), textcoords="offset points",
        ha="center", fontsize=9.5, fontweight="bold" if row["chosen"] else "normal",
    )  # fmt: skip


def _best_stock(axes: Axes, rows: Sequence[Report], field: str) -> None:
    """A line along the stock formats that no smaller stock format beats."""
    best: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row["bytes"]):
        better = max if field == "agreement" else min
        if is_stock(row["format"]) and (not best or better(best[-1][1], row[field]) != best[-1][1]):
            best.append((row["bytes"] / 1e6, row[field]))
    axes.plot(*zip(*best, strict=True) if best else ([], []), color=MUTED, linewidth=1, zorder=1)


def _end_to_end(figure: Figure, report: Report, narrow: bool) -> None:
    set_height(figure, 260)
    axes = figure.subplots()
    every: list[float] = []
    for row in report["latencies"]:
        times = sorted(row["end_to_end_seconds"])
        if not times:
            continue
        colour, dashes = WHO.get(row["who"], (MUTED, "-."))
        cumulative(axes, times, colour, dashes, row["who"])
        every += times
    axes.set_ylim(0, 1.03)
    percent_axis(axes, "y")
    time_axis(axes, every, narrow)
    axes.set_xlabel("time to the whole answer")
    axes.set_ylabel("prompts answered")
    legend(figure, axes, 2 if narrow else 3)


def cumulative(axes: Axes, times: Sequence[float], colour: str, dashes: str, label: str) -> None:
    """The share of `times`, which are sorted, up to each of them."""
    shares = [(i + 1) / len(times) for i in range(len(times))]
    axes.step(
        [times[0], *times], [0.0, *shares], where="post", color=colour, linestyle=dashes,
        linewidth=2.2, label=label,
    )  # fmt: skip


def time_axis(axes: Axes, times: Sequence[float], narrow: bool) -> None:
    """Logarithmic once the times span more than a factor of 8."""
    positive = [t for t in times if t > 0]
    if positive and max(positive) / min(positive) > 8:
        axes.set_xscale("log")
        few = narrow or max(positive) / min(positive) > 200
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.grid(True)
    axes.set_axisbelow(True)


def _first_token(figure: Figure, report: Report, narrow: bool) -> None:
    rows = report["latencies"]
    set_height(figure, 70 + 34 * len(rows))
    axes = figure.subplots()
    every = []
    for index, row in enumerate(rows):
        spread = row["time_to_first_token"]
        colour, dashes = WHO.get(row["who"], (MUTED, "-."))
        points = [spread["p50"], spread["p95"], spread["p99"]]
        axes.plot(points, [index] * 3, linestyle=dashes, color=colour, linewidth=1.6)
        for value, marker, fill in zip(points, "osd", (colour, PAPER, PAPER), strict=True):
            axes.plot(value, index, marker, color=colour, markerfacecolor=fill, markersize=8)
        every += points
    for label, marker, fill in (("p50", "o", MUTED), ("p95", "s", PAPER), ("p99", "d", PAPER)):
        axes.plot(
            [], [], marker, color=MUTED, markerfacecolor=fill, markersize=7, label=label
        )  # fmt: skip
    names = [row["who"].replace(" in ", "\nin ") if narrow else row["who"] for row in rows]
    axes.set_yticks(range(len(rows)), names, color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    time_axis(axes, every, narrow)
    axes.set_xlabel("time to the first token")
    legend(figure, axes, 3)


def _training(figure: Figure, report: Report, narrow: bool) -> None:
    _course(figure, report["training"], narrow)


def _fitting(figure: Figure, report: Report, narrow: bool) -> None:
    upper, lower = _course(figure, report["fitting"], narrow)
    chosen = next(p for p in report["fitting"] if p["step"] == report["fitted_step"])
    for name, style, label in (
        ("validation_nll", "D--", "teacher's text, validation"),
        ("validation_kld", "s:", "KL divergence, altered validation prompts"),
    ):
        found = [(p["step"], p[name]) for p in report["fitting"] if p[name] is not None]
        if found:
            upper.plot(*zip(*found, strict=True), style, color=INK, label=label)
            upper.legend(loc="upper right")
    upper.autoscale(axis="y")  # they may lie above the loss
    upper.set_ylim(bottom=0)
    lower.plot(chosen["step"], chosen["validation_agreement"], "*", color=INK, markersize=15)


def _course(figure: Figure, points: Sequence[Report], narrow: bool) -> tuple[Axes, Axes]:
    """Loss above, validation agreement below, over the steps."""
    set_height(figure, 300)
    losses = [(p["step"], p["loss"]) for p in points if p["loss"] is not None]
    scores = [
        (p["step"], p["validation_agreement"])
        for p in points
        if p["validation_agreement"] is not None
    ]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    if losses:
        upper.plot(*zip(*losses, strict=True), color=STUDENT, linewidth=1.8)
        upper.set_ylim(bottom=0)
    upper.set_ylabel("loss, nats a token")
    if scores:
        lower.plot(*zip(*scores, strict=True), "o-", color=STUDENT, linewidth=1.2, markersize=7)
        for step, score in scores:
            lower.annotate(
                f"{score * 100:.0f} %", (step, score), xytext=(0, -15),
                textcoords="offset points", ha="center", fontsize=10.5,
            )  # fmt: skip
    lower.set_ylim(0, 1.08)
    percent_axis(lower, "y")
    lower.set_ylabel("validation")
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))
    lower.margins(x=0.04)
    for axes in (upper, lower):
        axes.grid(True)
        axes.set_axisbelow(True)
    return upper, lower
