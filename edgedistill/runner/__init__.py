"""The runner: llama.cpp as one static program that answers the requests of runtime_child.py on a
device that has neither Python nor anything else of ours (runner.cpp).

It is the same llama.cpp as on this machine: the sources of the installed llama-cpp-python, compiled
once for each kind of processor and kept in the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from edgedistill.artifacts import digest_of
from edgedistill.errors import MissingTool
from edgedistill.progress import Progress
from edgedistill.weights.cache import cache_folder

PACKAGE = "llama-cpp-python"
# sha256 of the source archive, by version: the llama.cpp here and on a device must be one.
SOURCES: Mapping[str, str] = {
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
PARTS = ("CMakeLists.txt", "ceilings.h", "native.h", "runner.cpp")
# Those that shape an answer. runner.cpp hands a request to native.h as it came, and ceilings.h only
# times: a change there must not ask an emulator again, for hours, what it has answered.
SHAPING = ("CMakeLists.txt", "native.h")
X86, ARM = "x86_64", "aarch64"
ARCHITECTURES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}  # as systems name them
# llama.cpp picks kernels at run time only from shared libraries (GGML_CPU_ALL_VARIANTS), which a
# static program has none of. So one level for all: AVX2, FMA, F16C and BMI, in CPUs since 2013.
X86_MARCH = "x86-64-v3"
X86_NEEDS = ("avx2", "fma", "f16c")  # of it, as /proc/cpuinfo names them; BMI comes with them
# In the order of emulator.PROCESSORS, so that one compilation serves both.
ARM_FEATURES = {"asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fp16"}


@dataclass(frozen=True)
class Build:
    """What a runner is compiled for: `march` is GCC's -march."""

    architecture: str
    march: str


def build_for(architecture: str, features: Sequence[str]) -> Build:
    """The runner for a device, by its `uname -m` and what its /proc/cpuinfo lists.

    Raises:
        MissingTool: no runner is made for it.
    """
    known = ARCHITECTURES.get(architecture.lower())
    if known is None:
        hint = f"runners are made for {X86} and {ARM}; --runner FILE takes one that you compiled"
        raise MissingTool(f"there is no runner for a processor '{architecture}'", hint=hint)
    if known == ARM:
        extra = [name for flag, name in ARM_FEATURES.items() if flag in features]
        return Build(ARM, "+".join(["armv8.2-a" if extra else "armv8-a", *extra]))
    if missing := [name for name in X86_NEEDS if name not in features]:
        raise MissingTool(
            f"its processor lacks {', '.join(missing)}, and the runner is made for {X86_MARCH}",
            hint="compile one for it (docs/bench.md says how), and give it with --runner FILE",
        )
    return Build(X86, X86_MARCH)


def problem(build: Build) -> str | None:
    """What is missing here to compile it, with what to do; None when nothing is."""
    if platform.system() != "Linux":
        return f"a static program for Linux is compiled on Linux, and this is {platform.system()}"
    version = installed()
    if version not in SOURCES:
        known = ", ".join(SOURCES)
        return f"{PACKAGE} is {version or 'not installed'}; sources are pinned for {known}"
    compiler = compilers(build.architecture)[1]
    missing = [name for name in (compiler, "cmake", "make") if shutil.which(name) is None]
    if not missing:
        return None
    package = (
        "g++" if compiler == "g++" else f"g++-{build.architecture.replace('_', '-')}-linux-gnu"
    )
    return f"{', '.join(missing)} not found (Debian, Ubuntu: apt install {package} cmake make)"


def compilers(architecture: str) -> tuple[str, str]:
    """Of C and C++: this machine's own for its own kind of processor, else the cross compiler."""
    if ARCHITECTURES.get(platform.machine().lower()) == architecture:
        return "gcc", "g++"
    return f"{architecture}-linux-gnu-gcc", f"{architecture}-linux-gnu-g++"


def cached(build: Build, cache: Path | None = None) -> Path | None:
    """The runner where it was compiled before, else None."""
    from edgedistill.runner.building import runner_of, whole

    if installed() not in SOURCES:
        return None
    runner = runner_of(_folder(cache), build)
    return runner if whole(runner) else None


def prepare(build: Build, progress: Progress, cache: Path | None = None) -> Path:
    """The runner, compiled when it is not in the cache yet (some minutes; a killed compilation goes
    on where it was).

    Raises:
        MissingTool: this machine cannot compile it (`problem`).
        WeightsError: the sources cannot be fetched, or are not the pinned ones.
        RuntimeFailure: they do not compile.
        StorageError: the cache folder cannot be written.
    """
    found = cached(build, cache)
    if found is not None:
        return found
    if why := problem(build):
        raise MissingTool(f"the runner for {build.march} cannot be compiled here: {why}")
    from edgedistill.runner.building import compiled

    version = installed()
    return compiled(_folder(cache), version, SOURCES[version], build, progress)


def sources(parts: Mapping[str, str]) -> str:
    """Digest of what shapes the runner's answers: llama.cpp's sources, and of ours (`own_parts`)
    the SHAPING ones."""
    return digest_of([SOURCES[installed()], {name: parts[name] for name in SHAPING}])


def own_parts() -> dict[str, str]:
    """Texts of our part of the sources by file name; all of them name the compiled runner."""
    return {name: files(__name__).joinpath(name).read_text("utf-8") for name in PARTS}


def installed() -> str:
    """The version of llama-cpp-python here; "" for none."""
    try:
        return importlib.metadata.version(PACKAGE).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _folder(cache: Path | None) -> Path:
    return (cache or cache_folder().parent) / "runner" / SOURCES[installed()][:16]
