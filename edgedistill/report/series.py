"""How several results are told apart in one chart: a look of its own each, and a name that fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes

from edgedistill.report.plots import BAD, GATE, INK, MUTED, STUDENT, TEACHER

COLOURS = (STUDENT, TEACHER, GATE, INK, MUTED, BAD)
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
LEGEND = 19  # CSS pixels of one of its lines
FEW = 4
LEAST_SHARES = 0.04


def look(place: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of a result; no two of the first twelve have all alike."""
    return COLOURS[place % 6], MARKERS[place % 7], DASHES[place % 4]


def columns_of(names: Sequence[str], narrow: bool) -> tuple[int, int]:
    """Columns of a legend with these names, and how many characters each has room for: few long
    names are whole, each in a line of its own."""
    longest = max(map(len, names), default=0)
    if narrow:
        return (2, 18) if longest <= 18 else (1, 44)
    rooms = ((3, 27), (2, 42), (1, 90)) if len(names) <= FEW else ((3, 27), (2, 42))
    return next(((n, room) for n, room in rooms if longest <= room), rooms[-1])


def at_least_tall(axes: Axes) -> None:
    """An axis of shares over two points at least: less looks like a difference and is none."""
    low, high = axes.get_ylim()
    missing = max(0.0, LEAST_SHARES - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def shortened(names: Sequence[str], room: int) -> list[str]:
    """Each with at most `room` characters, the middle left out; what is alike then is numbered."""
    cut = [_cut(name, room) for name in names]
    alike, seen = Counter(cut), Counter[str]()
    for place, name in enumerate(cut):
        if alike[name] > 1 and len(name) < len(names[place]):
            seen[name] += 1
            cut[place] = f"{_cut(names[place], room - 3)} {seen[name]}"
    return cut


def _cut(name: str, room: int) -> str:
    if len(name) <= room:
        return name
    end = (room - 1) // 2
    return f"{name[: room - 1 - end]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - end :]}"
