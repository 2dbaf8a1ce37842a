"""Facts of the machine that measures: timings belong to it, so they carry its fingerprint.

Nothing here loads torch or a runtime.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from edgedistill.artifacts import digest_of, tool_versions
from edgedistill.linux_files import fields

# CPU features that decide which kernels llama.cpp and torch take (Linux names).
FEATURES = (
    "sse4_2", "avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimdhp",
    "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
PACKAGES = ("edgedistill", "llama-cpp-python", "torch", "transformers", "peft", "gguf")
ASKING_SECONDS = 10
CGROUP = Path("/sys/fs/cgroup")  # version 2, and version 1 below it


def facts() -> dict[str, Any]:
    """This machine as plain JSON; memory in bytes.

    Keys: cpu, cpu_features, physical_cores, logical_cores, usable_cores, memory_bytes, os,
    architecture, python, gpus, versions, fingerprint.
    """
    hardware = _hardware()
    return {
        **hardware,
        "os": _system(),
        "python": platform.python_version(),
        "versions": tool_versions(*PACKAGES),
        "fingerprint": hardware_digest(hardware, platform.system()),
    }


def fingerprint() -> str:
    """Short digest of what shapes timings here: CPU, its features, cores, memory, GPUs, OS kind.

    Versions and kernel builds are left out: tools are part of a stage's identity already.
    """
    return hardware_digest(_hardware(), platform.system())


def threads() -> int:
    """The default number of threads of every runtime here: the physical cores in our reach."""
    return min(psutil.cpu_count(logical=False) or 1, _usable_cores())


def memory_bytes(cgroup: Path = CGROUP) -> int | None:
    """Memory and swap that a process here could use, a container's bounds included. None where a
    GPU has its own, and on systems whose swap grows as it is needed."""
    if platform.system() != "Linux" or _gpus():
        return None
    swap = psutil.swap_memory().total
    bounds = [psutil.virtual_memory().total + swap]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": none
            bounds.append(int((cgroup / name).read_text("ascii")) + swap)
    return int(min(bounds))


def gpu_names() -> list[str]:
    """NVIDIA GPUs here, by name and memory."""
    return [name for name in _gpus() if "MiB" in name]


def child_environment() -> dict[str, str]:
    """The environment of a Python child of ours: it finds this package wherever we were found,
    installed or not, takes no module from the folder it is started in, and speaks UTF-8."""
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    return {**os.environ, **ours}


def hardware_digest(hardware: Mapping[str, Any], system: str) -> str:
    """The fingerprint of a device of this hardware and kind of system (Linux, Darwin, Windows)."""
    # Installed memory moves by a few MB with the kernel; the GB do not.
    shaping = {**hardware, "memory_bytes": round(hardware["memory_bytes"] / 1e9)}
    return digest_of({**shaping, "system": system})[:12]


def _hardware() -> dict[str, Any]:
    name, features = _cpu()
    return {
        "cpu": name,
        "cpu_features": features,
        "physical_cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "logical_cores": psutil.cpu_count() or 1,
        "usable_cores": _usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "architecture": platform.machine(),
        "gpus": _gpus(),
    }


def _usable_cores() -> int:
    """Logical cores this process may use (an affinity mask can be narrower than the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> tuple[str, list[str]]:
    system = platform.system()
    if system == "Linux":
        return cpu_of(Path("/proc/cpuinfo").read_text("utf-8", "replace"))
    if system == "Darwin":
        return _asked("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor(), []
    return os.environ.get("PROCESSOR_IDENTIFIER", "") or platform.processor() or "unknown", []


def cpu_of(cpuinfo: str) -> tuple[str, list[str]]:
    """Model name and known features of the first core in the text of Linux' `/proc/cpuinfo`."""
    known = fields(cpuinfo)
    named = ("model name", "hardware", "cpu part")  # ARM kernels often give only the part's number
    name = next((known[key] for key in named if known.get(key)), "unknown")
    flags = set((known.get("flags") or known.get("features") or "").split())
    return name, [feature for feature in FEATURES if feature in flags]


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    if platform.system() == "Linux":
        try:
            return platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            pass  # a minimal image without os-release
    return f"{platform.system()} {platform.release()}"


@functools.cache  # nvidia-smi takes a second where it exists
def _gpus() -> list[str]:
    """NVIDIA GPUs by name and memory; on Apple silicon the GPU is the chip itself."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return [f"{_asked('sysctl', '-n', 'machdep.cpu.brand_string')} GPU"]
    text = _asked("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _asked(*command: str) -> str:
    """What a system tool prints, or nothing when it is absent, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=ASKING_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
