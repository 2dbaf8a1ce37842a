"""The fidelity chains of several bundles side by side: what each hand-over left of the agreement,
and how far it moved the predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgedistill.report.plots import PAPER, legend, percent_axis, set_height
from edgedistill.report.series import LEGEND, at_least_tall, columns_of, look, shortened

Json = Mapping[str, Any]
ORDER = ("adapter", "merged", "exported", "trimmed", "fitted", "quantized")
SITTING = "this sitting"
LEAST_KLD = 1e-12  # below, it is the rounding of the computation
ASIDE = 0.07  # of the way to the next model: chains that give the same do not hide each other


def chained(rows: Sequence[Json]) -> list[Json]:
    """The rows whose model is of a bundle with its chain; of one bundle the first row draws it."""
    return [row for row in rows if row["chain"]]


def models(rows: Iterable[Json]) -> list[str]:
    """Whatever a chain leads to, in order; a device of its own behind the file that ships."""
    found = {
        name for row in rows for link in row["chain"] for name in (link["before"], link["after"])
    }
    last = [SITTING] if any(_own(row) is not None for row in rows) else []
    return [*(name for name in ORDER if name in found), *sorted(found - set(ORDER)), *last]


def draw_chains(figure: Figure, report: Json, narrow: bool) -> None:
    """`rows`: of a Compared, those that are `chained`."""
    rows, places = report["rows"], models(report["rows"])
    columns, room = columns_of([row["name"] for row in rows], narrow)
    names = shortened([row["name"] for row in rows], room)
    set_height(figure, 420 + LEGEND * math.ceil(len(rows) / columns))
    upper, lower = figure.subplots(2, 1, sharex=True)
    drawn: list[Any] = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        first = row["chain"] not in drawn
        drawn.append(row["chain"])
        aside = ASIDE * (number - (len(rows) - 1) / 2) if len(rows) < 8 else 0.0
        _agreement(upper, row, name, places, (number, aside), first)
        if first:
            _divergence(lower, row, places, (number, aside))
    percent_axis(upper, "y")
    upper.set_ylabel("agreement")
    upper.margins(y=0.15)
    lower.margins(y=0.15)
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no formulas: STYLE
    lower.yaxis.set_minor_formatter(lambda value, _: "")
    lower.set_ylabel("mean KLD,\nnats a token")
    if narrow:
        turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        lower.set_xticks(range(len(places)), places, **turned)
    else:
        lower.set_xticks(range(len(places)), [name.replace(" ", "\n") for name in places])
    lower.set_xlim(-0.5, len(places) - 0.5)
    at_least_tall(upper)
    for axes in (upper, lower):
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    legend(figure, upper, columns)


def _agreement(
    axes: Axes, row: Json, name: str, places: Sequence[str], at: tuple[int, float], whole: bool
) -> None:
    """Hollow and not joined: over fewer prompts than the others, or by the sitting itself."""
    (colour, marker, dashes), aside = look(at[0]), at[1]
    joined = [(row["chain"][0]["before"], row["chain"][0]["agreement_before"])]
    joined += [(x["after"], x["agreement_after"]) for x in row["chain"] if x["prompts"] is None]
    apart = [(x["after"], x["agreement_after"]) for x in row["chain"] if x["prompts"] is not None]
    if (own := _own(row)) is not None:
        apart.append((SITTING, own))
    if not whole:  # another result of the same bundle has drawn it
        joined, apart = [], apart[-1:] if own is not None else []
    if not joined and not apart:
        return
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7}
    axes.plot(
        [places.index(model) + aside for model, _ in joined], [share for _, share in joined],
        linestyle=dashes, linewidth=1.8, label=name, **style,
    )  # fmt: skip
    for model, share in apart:
        axes.plot(
            places.index(model) + aside, share, linestyle="none", markerfacecolor=PAPER,
            markeredgewidth=1.8, **style,
        )  # fmt: skip


def _divergence(axes: Axes, row: Json, places: Sequence[str], at: tuple[int, float]) -> None:
    (colour, marker, dashes), aside = look(at[0]), at[1]
    known = [link for link in row["chain"] if link["mean_kld"] is not None]
    axes.plot(
        [places.index(link["after"]) + aside for link in known],
        [max(LEAST_KLD, link["mean_kld"]) for link in known], linestyle=dashes, linewidth=1.2,
        marker=marker, markersize=7, color=colour,
    )  # fmt: skip


def _own(row: Json) -> float | None:
    """What the sitting found, where it asked the prompts of the chain and is not that itself."""
    if not row["on_chain"] or row["from_bundle"] or "agreement" not in row["figures"]:
        return None
    return float(row["figures"]["agreement"]["value"])
