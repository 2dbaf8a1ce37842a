"""What a device was in while something was measured, and who else was at work on it."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill.conditions import Conditions, changes, conditions_of, read_conditions
from edgedistill.console import Plain
from edgedistill.load_watch import (
    TELLS_OF_CHILDREN,
    Load,
    LoadWatch,
    Spent,
    _spent,
    others_share,
    spent_in,
    warn_of,
)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def rapl(joules: float, throttled: int) -> dict[str, str]:
    """Two packages, of which one has a part, and with them the whole board, which counts them."""
    energy, cpus = "sys/class/powercap/intel-rapl", "sys/devices/system/cpu"
    counts = {f"{cpus}/cpu{core}/thermal_throttle/core_throttle_count" for core in (0, 1)}
    zones = {":0": "package-0", ":0:0": "core", ":1": "psys", ":10": "package-1"}
    names = {f"{energy}{at}/name": name for at, name in zones.items()}
    spent = dict.fromkeys((f"{energy}{at}/energy_uj" for at in zones), str(int(joules * 1e6)))
    spent[f"{energy}:1/energy_uj"] = str(int(joules * 3e6))
    return dict.fromkeys(counts, str(throttled)) | names | spent


@pytest.mark.skipif(platform.system() != "Linux", reason="the files of Linux")
def test_what_happened_between_two_readings(tmp_path: Path) -> None:
    before = read_conditions(system(tmp_path, rapl(10, 3)))
    assert (before.joules, before.throttled) == (20, 6)
    after = read_conditions(system(tmp_path, rapl(12.5, 4)))
    assert changes(before, after) == {"joules": 5.0, "throttled": True}
    assert changes(after, before) == {"joules": None, "throttled": False}


def test_what_a_system_does_not_tell_is_none() -> None:
    found = conditions_of({})
    assert found == Conditions(None, None, None, None, None, None)
    assert changes(found, found) == {"joules": None, "throttled": None}
    assert read_conditions().power in (None, "mains", "battery")


SUPPLY = "/sys/class/power_supply"
BATTERY = {f"{SUPPLY}/BAT0/type": "Battery\n", f"{SUPPLY}/BAT0/capacity": "55\n"}
MAINS = {f"{SUPPLY}/AC/type": "Mains\n"}
PHONE = "  AC powered: false\n  USB powered: {usb}\n  level: 81\n  temperature: 312\n"


@pytest.mark.parametrize(
    ("files", "power", "percent"),
    [
        (MAINS | {f"{SUPPLY}/AC/online": "1\n"}, None, None),  # a desktop
        (BATTERY | MAINS | {f"{SUPPLY}/AC/online": "1\n"}, "mains", 55.0),
        (BATTERY | {f"{SUPPLY}/BAT0/status": "Discharging\n"}, "battery", 55.0),
        (BATTERY | {f"{SUPPLY}/BAT0/status": "Full\n"}, "mains", 55.0),
        (BATTERY | {f"{SUPPLY}/BAT0/status": "Unknown\n"}, None, 55.0),
        (BATTERY | {f"{SUPPLY}/BAT0/scope": "Device\n"}, None, None),  # a mouse's
        ({"dumpsys battery": PHONE.format(usb="true")}, "mains", 81.0),
        ({"dumpsys battery": PHONE.format(usb="false")}, "battery", 81.0),
    ],
)
def test_what_feeds_a_device(files: dict[str, str], power: str | None, percent: float) -> None:
    found = conditions_of(files)
    assert (found.power, found.battery_percent) == (power, percent)


@pytest.mark.parametrize(
    ("files", "celsius"),
    [
        ({"/sys/class/thermal/thermal_zone0/temp": "41000\n"}, 41.0),
        ({"/sys/class/thermal/thermal_zone0/temp": "-274000\n"}, None),  # not connected
        (
            {
                "/sys/class/thermal/thermal_zone0/temp": "99000\n",
                "/sys/class/hwmon/hwmon0/temp1_input": "50000\n",
                "/sys/class/hwmon/hwmon1/temp2_input": "61000\n",
            },
            61.0,
        ),
        ({"dumpsys battery": PHONE.format(usb="true")}, 31.2),
    ],
)
def test_the_hottest_sensor(files: dict[str, str], celsius: float | None) -> None:
    assert conditions_of(files).temperature_c == celsius


def test_the_mean_frequency() -> None:
    at = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"
    assert (
        conditions_of({at.format(0): "1000000\n", at.format(1): "3000000\n"}).frequency_mhz == 2000
    )
    told = "cpu MHz\t\t: 1500.5\ncpu MHz\t\t: 1500.5\n"
    assert conditions_of({"/proc/cpuinfo": told}).frequency_mhz == 1500.5


@pytest.mark.parametrize(
    ("before", "during", "busy"),
    [
        (0.0, 0.0, False),
        (0.2, 0.0, True),
        (0.0, 0.2, True),
        (0.01, None, False),
        (None, None, None),
    ],
)
def test_a_busy_machine_is_called_busy(before: float, during: float | None, busy: bool) -> None:
    assert Load(before, during).busy is busy


def test_others_share_is_without_ours() -> None:
    assert others_share(Spent(0, 0, 0), Spent(10, 8, 6)) == pytest.approx(0.2)
    assert others_share(Spent(0, 0, 0), Spent(10, 6, 7)) == 0  # ticks of two clocks


def test_the_ticks_of_a_system() -> None:
    found = spent_in("cpu  10 1 5 80 4 0 0 0 7 0\ncpu0 9 9 9 9 9\n", 3.0)
    assert found == Spent(all=100, busy=16, ours=3.0)
    assert spent_in("", 0.0) is None  # some phones let nobody read it


@pytest.mark.skipif(not TELLS_OF_CHILDREN, reason="the system does not tell of ended children")
def test_a_child_of_ours_counts_as_ours() -> None:
    burn = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    watch = LoadWatch(0.2)
    before = watch._start.ours
    subprocess.run([sys.executable, "-c", burn], check=True)
    load = watch.stop()
    assert load.during is not None
    assert 0 <= load.during <= 1
    assert _spent().ours - before > 0.3  # on a machine full of other work, too


@pytest.mark.parametrize(("before", "told"), [(0.3, 1), (0.05, 0), (None, 0)])
def test_other_work_is_told_before_it_spoils_the_figures(before: float | None, told: int) -> None:
    said: list[str] = []
    warn_of(before, Plain(said.append))
    assert len(said) == told
    assert all("warning: other work takes 30%" in line for line in said)
