"""From the pinned source archive to the compiled child, once per processor, in the user's cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from edgedistill import machine
from edgedistill.artifacts import digest_of_file, storing, write_atomic
from edgedistill.emulator import CHILD, PARTS
from edgedistill.errors import RuntimeFailure, WeightsError
from edgedistill.progress import Progress
from edgedistill.weights.cache import locked
from edgedistill.weights.network import download_source

NAME = "llama.cpp for aarch64"
CROSS = "aarch64-linux-gnu"
LLAMA = "vendor/llama.cpp/"
# What the libraries are made from; the rest (tests, docs, models) is most of the archive.
NEEDED = (
    "CMakeLists.txt",
    "cmake/",
    "ggml/",
    "include/",
    "src/",
    "vendor/",
    "LICENSE",
    "licenses/",
)
# "[12/76]" of ninja, "[ 16%]" of make.
STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")
LAST_LINES = 12
# The user's own flags are meant for this machine's processor.
FLAGS = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "ASFLAGS")
FetchSource = Callable[[str, Path], Path]


def compiled(
    folder: Path,
    version: str,
    sha256: str,
    march: str,
    progress: Progress,
    fetch: FetchSource = download_source,
) -> Path:
    """The child for `march`; it appears only when it is whole, and is checked against its digest.
    Sources and objects stay in `folder`: for another processor only the kernels compile again.

    Raises:
        WeightsError: the sources cannot be fetched, or are not the pinned ones.
        RuntimeFailure: they do not compile.
        StorageError: `folder` cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", NAME, progress):
            child = child_of(folder, march)
            if not whole(child):
                source = _source(folder, version, sha256, fetch, progress)
                _publish(_compile(folder, source, march, progress), child)
    return child


def child_of(folder: Path, march: str) -> Path:
    return folder / f"{CHILD}-{march}"


def whole(child: Path) -> bool:
    """Whether the child is there, byte for byte as it was compiled."""
    record = _record(child)
    if not child.is_file() or not record.is_file():
        return False
    return digest_of_file(child) == record.read_text("ascii").strip()


def _record(child: Path) -> Path:
    return child.with_name(f"{child.name}.sha256")


def _publish(made: Path, child: Path) -> None:
    """The digest first: a child without it, or with another's, is made again."""
    write_atomic(_record(child), digest_of_file(made).encode("ascii"))
    with made.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(made, child)


def _source(
    folder: Path, version: str, sha256: str, fetch: FetchSource, progress: Progress
) -> Path:
    """The unpacked sources of llama.cpp, fetched when they are not there yet."""
    unpacked = folder / "source"
    if not unpacked.is_dir():
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as place:
            with progress.task(f"fetch the sources of llama-cpp-python {version}", None):
                archive = fetch(f"llama-cpp-python=={version}", Path(place))
                found = digest_of_file(archive)
            if found != sha256:
                raise WeightsError(
                    f"the sources must have sha256 {sha256}; this index gives {found}",
                    where=archive.name,
                    hint="nothing of it is used, it was removed",
                )
            part = Path(place) / "source"
            _unpack(archive, part)
            os.replace(part, unpacked)
    return unpacked


def _unpack(archive: Path, into: Path) -> None:
    """The needed files below vendor/llama.cpp, without the folders above it."""
    with tarfile.open(archive) as members:
        for member in members:
            _, inside, name = member.name.partition(f"/{LLAMA}")
            stream = members.extractfile(member) if inside and name.startswith(NEEDED) else None
            if stream is not None:  # a file, not a folder or a link
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                (into / name).write_bytes(stream.read())


def _compile(folder: Path, source: Path, march: str, progress: Progress) -> Path:
    build, own = folder / "build", _own(folder)
    _forget_another(build, own)
    configure = ["cmake", "-S", str(own), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DLLAMA_CPP={source}", f"-DGGML_CPU_ARM_ARCH={march}"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    configure += [f"-DCMAKE_C_COMPILER={CROSS}-gcc", f"-DCMAKE_CXX_COMPILER={CROSS}-g++"]
    make = ["cmake", "--build", str(build), "--target", CHILD]
    make += ["--parallel", str(machine.threads())]
    with progress.task(f"compile {NAME} ({march})", 100, "%") as task:
        done = 0.0

        def told(line: str) -> None:
            nonlocal done
            if step := STEP.match(line):
                share = int(step[1]) / int(step[2] or 100) * 100
                task.advance(max(0.0, share - done))
                done = max(done, share)

        _run(configure, told)
        _run(make, told)
    return build / CHILD


def _own(folder: Path) -> Path:
    """Our part of the sources, beside llama.cpp's: where this package is installed may differ from
    one compilation to the next, and the cache outlives them."""
    own = folder / "own"
    own.mkdir(exist_ok=True)
    for name in PARTS:
        write_atomic(own / name, files("edgedistill.emulator").joinpath(name).read_bytes())
    return own


def _forget_another(build: Path, own: Path) -> None:
    """CMake refuses a build folder that was configured for another place, or was moved."""
    settings = build / "CMakeCache.txt"
    if settings.is_file() and f"={own}\n" not in settings.read_text("utf-8", "replace"):
        shutil.rmtree(build)


def _run(command: list[str], told: Callable[[str], None]) -> None:
    """Run one tool to its end, line by line.

    Raises:
        RuntimeFailure: it failed; its last lines are in the message.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if name not in FLAGS},
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told(line)
            lines = [*lines[1 - LAST_LINES :], line.rstrip()]
    if process.returncode != 0:
        said = "".join(f"\n    {line}" for line in lines)
        raise RuntimeFailure(
            f"{NAME} does not compile (exit code {process.returncode}); the last lines:{said}",
            where=" ".join(command[:2]),
            hint="bench.emulated_prompts: 0 in the recipe goes on without it",
        )
