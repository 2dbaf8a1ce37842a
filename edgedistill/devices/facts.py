"""What a device is, from what it tells about itself: the same keys as machine.facts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgedistill.linux_files import Files, fields, number
from edgedistill.machine import cpu_of, hardware_digest
from edgedistill.runner import ARCHITECTURES, ARM

PRESENT = "/sys/devices/system/cpu/present"  # 0-3,6: cores that sleep, too
FILES = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/etc/os-release",
    "/proc/device-tree/model",
    "/sys/devices/virtual/dmi/id/product_name",
    "/sys/devices/system/cpu/cpu*/topology/thread_siblings_list",
    PRESENT,
)
UNAME, MACHINE = "uname -sr", "uname -m"
CORES = "env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc"  # which else says what these allow
MODEL, SYSTEM, CHIP = (
    f"getprop ro.{name}" for name in ("product.model", "build.version.release", "soc.model")
)
GPUS = "nvidia-smi --query-gpu=name,memory.total --format=csv,noheader"
# A Mac has no /proc.
APPLE_CPU, APPLE_MEMORY, APPLE_CORES, APPLE_LOGICAL = (
    f"sysctl -n {name}"
    for name in ("machdep.cpu.brand_string", "hw.memsize", "hw.physicalcpu", "hw.logicalcpu")
)
APPLE_SYSTEM = "sw_vers -productVersion"
COMMANDS = (
    UNAME, MACHINE, CORES, MODEL, SYSTEM, CHIP, GPUS, APPLE_CPU, APPLE_MEMORY, APPLE_CORES,
    APPLE_LOGICAL, APPLE_SYSTEM,
)  # fmt: skip


def facts_of(files: Files) -> dict[str, Any]:
    """From the texts of FILES and what COMMANDS print. Memory in bytes; `threads` is the default
    number of them: the physical cores in our reach. Cores that sleep are not in `usable_cores`, and
    a device is the same with them. What the device does not tell is None, 0 or empty."""
    hardware = _hardware(files)
    kind = _told(files, UNAME).split(" ")[0] or "unknown"
    awake = {**hardware, "usable_cores": hardware["usable_cores"] + _asleep(files)}
    return {
        **hardware,
        "model": _model(files),
        "os": _system(files),
        "python": None,
        "versions": {},
        "fingerprint": hardware_digest(awake, kind),
        "threads": min(hardware["physical_cores"], hardware["usable_cores"]),
    }


def _hardware(files: Files) -> dict[str, Any]:
    name, features = _cpu(files)
    logical, asleep = _logical(files), _asleep(files)
    usable = number(files, CORES) or logical
    return {
        "cpu": name,
        "cpu_features": features,
        "physical_cores": (_physical(files) or logical) + asleep,
        "logical_cores": logical + asleep,
        "usable_cores": usable,
        "memory_bytes": _memory(files),
        "architecture": _told(files, MACHINE) or "unknown",
        "gpus": [line.strip() for line in _told(files, GPUS).splitlines() if "MiB" in line],
    }


def _cpu(files: Files) -> tuple[str, list[str]]:
    name, features = cpu_of(files.get("/proc/cpuinfo", ""))
    if name == "unknown" or name.startswith("0x"):  # a part's number, which tells little
        better = _told(files, CHIP) or _told(files, APPLE_CPU) or _board(files)
        name = better or (name if name == "unknown" else f"ARM part {name}")
    return name, features


def _logical(files: Files) -> int:
    listed = files.get("/proc/cpuinfo", "").splitlines()
    counted = sum(line.partition(":")[0].strip() == "processor" for line in listed)
    return counted or number(files, APPLE_LOGICAL) or 1


def _asleep(files: Files) -> int:
    """Cores that the system has sent to sleep, as phones do. On x86 a core that is off was switched
    off by somebody (often the second threads), and machine.facts counts it as little."""
    if ARCHITECTURES.get(_told(files, MACHINE)) != ARM:
        return 0
    return max(0, _count(files.get(PRESENT, "")) - _logical(files))


def _count(listed: str) -> int:
    """Of a list like 0-3,6; 0 where it is none."""
    spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", span) for span in listed.strip().split(",")]
    return sum(int(span[2] or span[1]) - int(span[1]) + 1 for span in spans if span)


def _physical(files: Files) -> int | None:
    """Cores whose threads differ; a core that is asleep tells of none."""
    cores = {text.strip() for name, text in files.items() if name.endswith("thread_siblings_list")}
    return len(cores) or number(files, APPLE_CORES)


def _memory(files: Files) -> int:
    total = fields(files.get("/proc/meminfo", "")).get("memtotal", "").split()
    if total and total[0].isdigit():
        return int(total[0]) * 1024
    return number(files, APPLE_MEMORY) or 0


def _model(files: Files) -> str | None:
    product = files.get("/sys/devices/virtual/dmi/id/product_name", "").strip()
    return _told(files, MODEL) or _board(files) or product or None


def _system(files: Files) -> str:
    if version := _told(files, SYSTEM):
        return f"Android {version}"
    if version := _told(files, APPLE_SYSTEM):
        return f"macOS {version}"
    release: Mapping[str, str] = fields(files.get("/etc/os-release", ""), "=")
    return release.get("pretty_name", "").strip("\"'") or _told(files, UNAME) or "unknown"


def _board(files: Files) -> str:
    return files.get("/proc/device-tree/model", "").strip("\0 \n")


def _told(files: Files, command: str) -> str:
    return files.get(command, "").strip()
