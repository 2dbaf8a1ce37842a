"""What a device was in while something was measured on it: its power source, how hot it was, and
whether it slowed itself down. What a system does not tell is None, never a guess.
"""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgedistill.linux_files import Files, fields, number, read_files

# Where Linux tells them; energy (RAPL) is readable by root alone on most systems. The parts of a
# zone (intel-rapl:0:0) are counted in it.
RAPL = "/sys/class/powercap/intel-rapl:"
FILES = (
    "/sys/class/power_supply/*/type",
    "/sys/class/power_supply/*/scope",
    "/sys/class/power_supply/*/online",
    "/sys/class/power_supply/*/status",
    "/sys/class/power_supply/*/capacity",
    "/sys/class/hwmon/hwmon*/temp*_input",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq",
    "/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
    f"{RAPL}[0-9]/name",
    f"{RAPL}[0-9]/energy_uj",
    f"{RAPL}[0-9][0-9]/name",
    f"{RAPL}[0-9][0-9]/energy_uj",
    "/proc/cpuinfo",
)
BATTERY = "dumpsys battery"  # Android, which lets nobody read those files
COMMANDS = (BATTERY,)
MEGAHERTZ = re.compile(r"^cpu MHz\s*:\s*([\d.]+)", re.M)
PLAUSIBLE = range(1_000, 150_000)  # a sensor's millidegrees; others are not connected


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


def read_conditions(root: Path = Path("/")) -> Conditions:
    """As this machine tells them now."""
    if platform.system() == "Linux":
        return conditions_of(read_files(FILES, root))
    battery = _asked("sensors_battery")
    frequency = _asked("cpu_freq")
    return Conditions(
        power=None if battery is None else "mains" if battery.power_plugged else "battery",
        battery_percent=None if battery is None else float(battery.percent),
        temperature_c=None,
        frequency_mhz=float(frequency.current) if frequency and frequency.current else None,
        throttled=None,
        joules=None,
    )


def conditions_of(files: Files) -> Conditions:
    """As a Linux system tells them in `files` (those of FILES, and what COMMANDS print)."""
    power, percent = _power(files)
    return Conditions(
        power=power,
        battery_percent=percent,
        temperature_c=_hottest(files),
        frequency_mhz=_frequency(files),
        throttled=_sum(_numbers(files, "/sys/devices/system/cpu/", "core_throttle_count")),
        joules=_joules(files),
    )


def changes(before: Conditions, after: Conditions | None) -> dict[str, Any]:
    """What happened between two readings: joules spent, and whether the device throttled."""
    if after is None:  # it was not there to be read
        return {"joules": None, "throttled": None}
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


def _power(files: Files) -> tuple[str | None, float | None]:
    """Of a device with a battery: what feeds it, and how full that is in percent."""
    told = fields(files.get(BATTERY, ""))
    if "level" in told:
        plugged = any(told.get(f"{way} powered") == "true" for way in ("ac", "usb", "wireless"))
        return ("mains" if plugged else "battery"), float(told["level"])
    supplies = {name.rpartition("/")[0] for name in files if "/power_supply/" in name}
    kinds = {at: files.get(f"{at}/type", "").strip() for at in sorted(supplies)}
    # A mouse's battery has the scope Device.
    cells = [
        at
        for at in kinds
        if kinds[at] == "Battery" and "Device" not in files.get(f"{at}/scope", "")
    ]
    if not cells:
        return None, None
    status = files.get(f"{cells[0]}/status", "").strip()
    online = any(number(files, f"{at}/online") == 1 for at in kinds if kinds[at] != "Battery")
    known = online or status in ("Charging", "Full", "Not charging", "Discharging")
    plugged = online or status in ("Charging", "Full", "Not charging")
    percent = number(files, f"{cells[0]}/capacity")
    power = ("mains" if plugged else "battery") if known else None
    return power, None if percent is None else float(percent)


def _hottest(files: Files) -> float | None:
    """Of the sensors that drivers name, else of the thermal zones."""
    for folder in ("/sys/class/hwmon/", "/sys/class/thermal/"):
        found = [value for value in _numbers(files, folder) if value in PLAUSIBLE]
        if found:
            return max(found) / 1000
    battery = fields(files.get(BATTERY, "")).get("temperature", "")
    return float(battery) / 10 if battery.isdigit() else None


def _frequency(files: Files) -> float | None:
    kilohertz = list(_numbers(files, "/sys/devices/system/cpu/", "scaling_cur_freq"))
    if kilohertz:
        return statistics.fmean(kilohertz) / 1000
    told = MEGAHERTZ.findall(files.get("/proc/cpuinfo", ""))
    return statistics.fmean(map(float, told)) if told else None


def _joules(files: Files) -> float | None:
    """Of the packages alone: many laptops have a zone beside them, psys, which counts them again
    with the rest of the board."""
    zones = {name.rpartition("/")[0] for name in files if name.startswith(RAPL)}
    packages = [at for at in zones if files.get(f"{at}/name", "").startswith("package-")]
    micro = _sum(each for at in packages for each in _numbers(files, f"{at}/", "energy_uj"))
    return None if micro is None else micro / 1e6


def _numbers(files: Files, folder: str, name: str = "") -> Iterable[int]:
    """Of the files in `folder` whose names end with `name`."""
    for file in files:
        if file.startswith(folder) and file.endswith(name):
            value = number(files, file)
            if value is not None:
                yield value


def _sum(values: Iterable[int]) -> int | None:
    held = list(values)
    return sum(held) if held else None
