"""What is read from a device by one script each: what it is, what it is in, how busy it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgedistill import conditions
from edgedistill.conditions import Conditions, conditions_of
from edgedistill.devices import facts
from edgedistill.devices.shell import Shell
from edgedistill.errors import DeviceError
from edgedistill.linux_files import parse_files, script_of
from edgedistill.load_watch import LISTENING_SECONDS, Load, Spent, others_share, spent_in

STAT, THEN = "/proc/stat", "edgedistill-then"


@dataclass
class Readings:
    """Of one device. `ours`: ticks of processor time that runners of ours took there and that have
    ended; what is still at work is not in it."""

    shell: Shell
    ours: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What it is, as machine.facts has it; `threads` too.

        Raises:
            DeviceError: it cannot be reached, or runs no script.
        """
        printed = self._printed(script_of(facts.FILES, facts.COMMANDS), "asking what it is")
        return facts.facts_of(parse_files(printed))

    def conditions(self) -> Conditions:
        """What it is in now."""
        script = script_of(conditions.FILES, conditions.COMMANDS)
        return conditions_of(parse_files(self._printed(script, "asking how it is")))

    def listen(self) -> DeviceWatch:
        """Hear for a second how busy it is, and count from then on."""
        once = script_of([STAT])
        script = f"{once}\nsleep {LISTENING_SECONDS:g}\necho {THEN}\n{once}"
        first, _, second = self._printed(script, "listening to other work").partition(THEN)
        before, start = spent_in(_stat(first), self.ours), spent_in(_stat(second), self.ours)
        share = others_share(before, start) if before and start else None
        return DeviceWatch(self, share, start)

    def count(self, pid: int) -> None:
        """That a runner of ours, which still runs, has spent so much."""
        files = parse_files(
            self._printed(script_of([f"/proc/{pid}/stat"]), "counting our own work")
        )
        self.ours += ticks_of(files.get(f"/proc/{pid}/stat", ""))

    def spent(self) -> Spent | None:
        """By anyone and by our runners so far; None where the device tells nothing."""
        return spent_in(_stat(self._printed(script_of([STAT]), "counting other work")), self.ours)

    def _printed(self, script: str, step: str) -> str:
        said = self.shell.run(script, step)
        if said.code != 0:
            raise DeviceError(f"{step}: {said.reason}", where=self.shell.address)
        return said.out


@dataclass
class DeviceWatch:
    """Counts what other work takes until it is stopped."""

    readings: Readings
    before: float | None
    start: Spent | None

    def stop(self) -> Load:
        """What was seen."""
        start, end = self.start, self.readings.spent()
        return Load(self.before, others_share(start, end) if start and end else None)


def ticks_of(stat: str) -> float:
    """Of user and system, from the text of /proc/PID/stat; 0 where it tells nothing."""
    behind = stat.rpartition(")")[2].split()  # the name before may hold anything
    return float(behind[11]) + float(behind[12]) if len(behind) > 12 else 0.0


def _stat(printed: str) -> str:
    return parse_files(printed).get(STAT, "")
