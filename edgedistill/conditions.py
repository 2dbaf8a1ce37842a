"""What a device was in while something was measured on it: its power source, how hot it was, and
whether it slowed itself down. What a system does not tell is None, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CPUS = Path("/sys/devices/system/cpu")
ENERGY = Path("/sys/class/powercap")  # RAPL: microjoules, readable by root alone on most systems


@dataclass(frozen=True)
class Conditions:
    """`power`: "mains" or "battery"; temperatures in degrees Celsius, the hottest sensor's;
    `frequency_mhz`: the mean over cores; `throttled`: events since the start of the system;
    `joules`: of all packages, since some moment."""

    power: str | None
    battery_percent: float | None
    temperature_c: float | None
    frequency_mhz: float | None
    throttled: int | None
    joules: float | None


def read_conditions(cpus: Path = CPUS, energy: Path = ENERGY) -> Conditions:
    """As this machine tells them now."""
    battery = _asked("sensors_battery")
    frequency = _asked("cpu_freq")
    return Conditions(
        power=None if battery is None else "mains" if battery.power_plugged else "battery",
        battery_percent=None if battery is None else float(battery.percent),
        temperature_c=_hottest(_asked("sensors_temperatures") or {}),
        frequency_mhz=float(frequency.current) if frequency and frequency.current else None,
        throttled=_sum(cpus.glob("cpu*/thermal_throttle/core_throttle_count")),
        joules=_joules(energy),
    )


def changes(before: Conditions, after: Conditions) -> dict[str, Any]:
    """What happened between two readings: joules spent, and whether the device throttled."""
    throttled = None
    if before.throttled is not None and after.throttled is not None:
        throttled = after.throttled > before.throttled
    return {"joules": spent(before.joules, after.joules), "throttled": throttled}


def spent(before: float | None, after: float | None) -> float | None:
    """Joules between two readings. The counter begins anew after some minutes or hours; then
    nothing is known."""
    if before is None or after is None or after < before:
        return None
    return after - before


def _asked(name: str) -> Any:
    """psutil lacks some sensors on some systems, and others fail where there is none."""
    try:
        return getattr(psutil, name)()
    except (AttributeError, OSError, RuntimeError, NotImplementedError):
        return None


def _hottest(chips: dict[str, Any]) -> float | None:
    found = [reading.current for readings in chips.values() for reading in readings]
    return max(map(float, found), default=None)


def _sum(files: Any) -> int | None:
    counts = [count for file in files if (count := _number(file)) is not None]
    return sum(counts) if counts else None


def _joules(folder: Path) -> float | None:
    """Of the packages, not of the parts that are counted in them."""
    micro = _sum(folder.glob("intel-rapl:[0-9]/energy_uj"))
    return None if micro is None else micro / 1e6


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):
        return None
