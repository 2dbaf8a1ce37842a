"""How busy a machine was with other work while something was measured on it.

A busy machine's figures are worth nothing, and an average hides that; so the share of the processor
time that others took is a part of each result.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import psutil

from edgedistill.progress import Progress

BUSY_SHARE = 0.05  # of all cores together, from which a result says that it was disturbed
LISTENING_SECONDS = 1.0
TELLS_OF_CHILDREN = sys.platform.startswith("linux")  # elsewhere psutil gives 0 for ended ones


@dataclass(frozen=True)
class Load:
    """Shares of the time of all cores: `before` the measuring, and `during` it, both by other
    processes than ours. None is what a system does not tell: some phones nothing, and others not
    what ended children took."""

    before: float | None
    during: float | None

    @property
    def others(self) -> float | None:
        """The larger of the two that are known."""
        return max((each for each in (self.before, self.during) if each is not None), default=None)

    @property
    def told(self) -> str:
        """Both that are known, in words."""
        times = ((self.before, "before"), (self.during, "while it was measured"))
        return " and ".join(f"{share:.0%} {when}" for share, when in times if share is not None)

    @property
    def busy(self) -> bool | None:
        """Whether other work may have disturbed the figures; None where nothing is known."""
        return None if self.others is None else self.others > BUSY_SHARE


def warn_of(before: float | None, progress: Progress) -> None:
    """Tell of other work before anything is measured, while that can still be put off."""
    if before is not None and before > BUSY_SHARE:
        progress.note(
            f"warning: other work takes {before:.0%} of the processor time (more than "
            f"{BUSY_SHARE:.0%}): these figures will be no measure of the machine"
        )


class LoadWatch:
    """Listens `before`, and counts until `stop`."""

    def __init__(self, seconds: float = LISTENING_SECONDS) -> None:
        start = _spent()
        time.sleep(seconds)
        self.before: float | None = others_share(start, _spent())
        self._start = _spent()

    def stop(self) -> Load:
        """What was seen. Children of ours that have ended count as ours."""
        return Load(self.before, others_share(self._start, _spent()) if TELLS_OF_CHILDREN else None)


@dataclass(frozen=True)
class Spent:
    """Seconds of processor time since some moment: of all cores, by anyone, and by us."""

    all: float
    busy: float
    ours: float


def _spent() -> Spent:
    times = psutil.cpu_times()
    # Linux counts a guest's time in user and nice, too.
    counted = [name for name in times._fields if not name.startswith("guest")]
    whole = sum(getattr(times, name) for name in counted)
    idle = times.idle + getattr(times, "iowait", 0.0)
    return Spent(whole, whole - idle, _ours())


def spent_in(stat: str, ours: float) -> Spent | None:
    """What the text of a Linux system's /proc/stat tells, in its ticks, as `ours` is; None where
    it tells nothing."""
    line = next((line.split()[1:] for line in stat.splitlines() if line.startswith("cpu ")), [])
    ticks = [float(each) for each in line[:8]]  # user to steal; guests are in user
    if len(ticks) < 5:
        return None
    return Spent(sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours)


def _ours() -> float:
    """Of this process, its children, and of those that have ended."""
    me = psutil.Process(os.getpid())
    own = me.cpu_times()
    total = own.user + own.system
    total += getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    for child in me.children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        total += spent.user + spent.system
    return total


def others_share(start: Spent, end: Spent) -> float:
    """Others' share of the cores' time, 0 to 1."""
    others = (end.busy - start.busy) - (end.ours - start.ours)
    return min(1.0, max(0.0, others / max(end.all - start.all, 1e-9)))
