"""aarch64 without the hardware: llama.cpp's ARM kernels under QEMU's user-mode emulation.

The same llama.cpp as on this machine is compiled once for a device's processor (runner/). QEMU
executes each instruction as the processor's manual has it, so answers are those of the real
kernels; its speed says nothing about a device, and none is ever reported.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedistill import runner
from edgedistill.artifacts import digest_of
from edgedistill.errors import MissingTool
from edgedistill.progress import Progress
from edgedistill.runner import ARM, Build

PROGRAMS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "cmake", "make")
INSTALL = "Debian, Ubuntu: apt install qemu-user-static g++-aarch64-linux-gnu cmake make"
REQUEST_SECONDS = 2 * 3600.0  # an answer of the 135M student takes a minute, of larger ones hours


@dataclass(frozen=True)
class Processor:
    """What llama.cpp is compiled for (`march`, GCC's -march) and what QEMU acts as (`cpu`)."""

    march: str
    cpu: str

    @property
    def build(self) -> Build:
        return Build(ARM, self.march)


# By a target's device_class. Which repacked kernels llama.cpp takes hangs on these features
# (ggml-cpu/repack.cpp): with i8mm those for matrix multiplies, without it those for dot products.
PROCESSORS: Mapping[str, Processor] = {
    # Phones since 2022 (ARMv9 cores) have i8mm; llama.cpp's own builds for Android use no SVE.
    "phone": Processor("armv8.2-a+dotprod+i8mm+fp16", "max"),
    # The Raspberry Pi 5's cores.
    "board": Processor("armv8.2-a+dotprod+fp16", "cortex-a76"),
}


@dataclass(frozen=True)
class Emulator:
    """A runtime child for `processor` that runs here: `LlamaCpp(file, command=emulator.command,
    request_seconds=REQUEST_SECONDS)`. Its `facts` hold one more: `buffers` (where it put the
    weights, CPU_REPACK among them)."""

    command: tuple[str, ...]
    processor: Processor


def emulator_problem() -> str | None:
    """What is missing here to emulate aarch64, with what to do; None when nothing is."""
    if platform.system() != "Linux":
        return f"QEMU's user-mode emulation needs Linux, this is {platform.system()}"
    version = runner.installed()
    if version not in runner.SOURCES:
        known, package = ", ".join(runner.SOURCES), runner.PACKAGE
        return f"{package} is {version or 'not installed'}; aarch64 sources are pinned for {known}"
    missing = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(missing)} not found ({INSTALL})" if missing else None


def identity(device_class: str) -> str | None:
    """Digest of all that shapes an emulator's answers; None where there is none for that class."""
    processor = PROCESSORS.get(device_class)
    if processor is None or emulator_problem() is not None:
        return None
    return digest_of([runner.sources(runner.own_parts()), processor.march, processor.cpu])


def cached(device_class: str, cache: Path | None = None) -> Emulator | None:
    """The emulator of a device class where it was compiled before, else None."""
    if identity(device_class) is None:
        return None
    found = runner.cached(PROCESSORS[device_class].build, cache)
    return None if found is None else _emulator(device_class, found)


def prepare_aarch64(device_class: str, progress: Progress, cache: Path | None = None) -> Emulator:
    """The emulator of a device class, compiled when it is not in the cache yet (about ten minutes
    on two cores; a killed compilation goes on where it was).

    Raises:
        MissingTool: this machine cannot emulate (`emulator_problem`).
        WeightsError: the sources cannot be fetched, or are not the pinned ones.
        RuntimeFailure: they do not compile.
        StorageError: the cache folder cannot be written.
    """
    if identity(device_class) is None:
        raise MissingTool(emulator_problem() or f"there is no processor for '{device_class}'")
    made = runner.prepare(PROCESSORS[device_class].build, progress, cache)
    return _emulator(device_class, made)


def _emulator(device_class: str, made: Path) -> Emulator:
    processor, qemu = PROCESSORS[device_class], _program("qemu-aarch64")
    assert qemu is not None
    return Emulator((qemu, "-cpu", processor.cpu, str(made), "--untimed"), processor)


def _program(name: str) -> str | None:
    """Debian calls the static one differently; either runs a static program."""
    return shutil.which(f"{name}-static") or shutil.which(name)
