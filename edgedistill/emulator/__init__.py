"""aarch64 without the hardware: llama.cpp's ARM kernels under QEMU's user-mode emulation.

The same llama.cpp as on this machine (the sources of the installed llama-cpp-python) is compiled
once for a device's processor, into one static program (child.cpp) that answers the requests of
runtime_child.py. QEMU executes each instruction as the processor's manual has it, so answers are
those of the real kernels; its speed says nothing about a device, and none is ever reported.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from edgedistill.artifacts import digest_of
from edgedistill.errors import MissingTool
from edgedistill.progress import Progress
from edgedistill.weights.cache import cache_folder

PACKAGE = "llama-cpp-python"
# sha256 of the source archive, by version: the two llama.cpp that are compared must be one.
SOURCES: Mapping[str, str] = {
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
PARTS = ("CMakeLists.txt", "child.cpp")
CHILD = "child"
PROGRAMS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "cmake", "make")
INSTALL = "Debian, Ubuntu: apt install qemu-user-static g++-aarch64-linux-gnu cmake make"
REQUEST_SECONDS = 2 * 3600.0  # an answer of the 135M student takes a minute, of larger ones hours


@dataclass(frozen=True)
class Processor:
    """What llama.cpp is compiled for (`march`, GCC's -march) and what QEMU acts as (`cpu`)."""

    march: str
    cpu: str


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
    request_seconds=REQUEST_SECONDS)`. Its `facts` hold two more: `kernels` (the instructions that
    llama.cpp was compiled for) and `buffers` (where it put the weights, CPU_REPACK among them)."""

    command: tuple[str, ...]
    processor: Processor


def emulator_problem() -> str | None:
    """What is missing here to emulate aarch64, with what to do; None when nothing is."""
    if platform.system() != "Linux":
        return f"QEMU's user-mode emulation needs Linux, this is {platform.system()}"
    version = _installed()
    if version not in SOURCES:
        known = ", ".join(SOURCES)
        return f"{PACKAGE} is {version or 'not installed'}; aarch64 sources are pinned for {known}"
    missing = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(missing)} not found ({INSTALL})" if missing else None


def identity(device_class: str) -> str | None:
    """Digest of all that shapes an emulator's answers; None where there is none for that class."""
    processor = PROCESSORS.get(device_class)
    if processor is None or emulator_problem() is not None:
        return None
    return digest_of([_sources(), processor.march, processor.cpu])


def cached(device_class: str, cache: Path | None = None) -> Emulator | None:
    """The emulator of a device class where it was compiled before, else None."""
    if identity(device_class) is None:
        return None
    from edgedistill.emulator.building import child_of, whole

    child = child_of(_folder(cache), PROCESSORS[device_class].march)
    return _emulator(device_class, child) if whole(child) else None


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
    from edgedistill.emulator.building import compiled

    version, march = _installed(), PROCESSORS[device_class].march
    child = compiled(_folder(cache), version, SOURCES[version], march, progress)
    return _emulator(device_class, child)


def _sources() -> str:
    """Digest of llama.cpp's sources and of ours."""
    own = {name: files(__name__).joinpath(name).read_text("utf-8") for name in PARTS}
    return digest_of([SOURCES[_installed()], own])


def _folder(cache: Path | None) -> Path:
    return (cache or cache_folder().parent) / "emulator" / _sources()[:16]


def _emulator(device_class: str, child: Path) -> Emulator:
    processor, qemu = PROCESSORS[device_class], _program("qemu-aarch64")
    assert qemu is not None
    return Emulator((qemu, "-cpu", processor.cpu, str(child)), processor)


def _program(name: str) -> str | None:
    """Debian calls the static one differently; either runs a static program."""
    return shutil.which(f"{name}-static") or shutil.which(name)


def _installed() -> str:
    try:
        return importlib.metadata.version(PACKAGE).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""
