"""What a device was in while something was measured, and who else was at work on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill.conditions import changes, read_conditions
from edgedistill.load_watch import (
    TELLS_OF_CHILDREN,
    Load,
    LoadWatch,
    Spent,
    _spent,
    others_share,
)


def system(folder: Path, joules: float, throttled: int) -> dict[str, Path]:
    cpus, energy = folder / "cpu", folder / "powercap"
    for core in (0, 1):
        counts = cpus / f"cpu{core}" / "thermal_throttle"
        counts.mkdir(parents=True, exist_ok=True)
        (counts / "core_throttle_count").write_text(f"{throttled}\n")
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (energy / name).mkdir(parents=True, exist_ok=True)
        (energy / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    return {"cpus": cpus, "energy": energy}


def test_what_happened_between_two_readings(tmp_path: Path) -> None:
    before = read_conditions(**system(tmp_path, 10, 3))
    assert (before.joules, before.throttled) == (20, 6)
    after = read_conditions(**system(tmp_path, 12.5, 4))
    assert changes(before, after) == {"joules": 5.0, "throttled": True}
    assert changes(after, before) == {"joules": None, "throttled": False}


def test_what_a_system_does_not_tell_is_none(tmp_path: Path) -> None:
    found = read_conditions(tmp_path, tmp_path)
    assert (found.joules, found.throttled) == (None, None)
    assert changes(found, found) == {"joules": None, "throttled": None}
    here = read_conditions()
    assert here.power in (None, "mains", "battery")


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
