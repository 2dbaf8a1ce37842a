"""From the pinned source archive to the compiled runner, once per processor, in the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgedistill import machine
from edgedistill.artifacts import digest_of, digest_of_file, storing, write_atomic
from edgedistill.errors import RuntimeFailure, WeightsError
from edgedistill.progress import Progress
from edgedistill.runner import ARM, Build, compilers, own_parts
from edgedistill.weights.cache import locked
from edgedistill.weights.network import download_source

NAME, RUNNER = "llama.cpp", "runner"
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
# What x86-64-v3 is, in the words of ggml's CMakeLists.txt.
X86_OPTIONS = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
# The user's own flags are meant for this machine's processor.
FLAGS = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "ASFLAGS")
FetchSource = Callable[[str, Path], Path]


def compiled(
    folder: Path,
    version: str,
    sha256: str,
    build: Build,
    progress: Progress,
    fetch: FetchSource = download_source,
) -> Path:
    """The runner for `build`; it appears only when it is whole, and is checked against its digest.
    Sources and objects stay in `folder`: for another processor of one architecture only the kernels
    compile again, and after a change of ours only our part.

    Raises:
        WeightsError: the sources cannot be fetched, or are not the pinned ones.
        RuntimeFailure: they do not compile.
        StorageError: `folder` cannot be written.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", NAME, progress):
            runner = runner_of(folder, build)
            if not whole(runner):
                source = _source(folder, version, sha256, fetch, progress)
                _publish(_compile(folder, source, version, build, progress), runner)
    return runner


def runner_of(folder: Path, build: Build) -> Path:
    return folder / f"{RUNNER}-{build.march}-{digest_of(own_parts())[:12]}"


def whole(runner: Path) -> bool:
    """Whether the runner is there, byte for byte as it was compiled."""
    record = _record(runner)
    if not runner.is_file() or not record.is_file():
        return False
    return digest_of_file(runner) == record.read_text("ascii").strip()


def _record(runner: Path) -> Path:
    return runner.with_name(f"{runner.name}.sha256")


def _publish(made: Path, runner: Path) -> None:
    """The digest first: a runner without it, or with another's, is made again."""
    write_atomic(_record(runner), digest_of_file(made).encode("ascii"))
    with made.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(made, runner)


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


def _compile(folder: Path, source: Path, version: str, build: Build, progress: Progress) -> Path:
    place, own = folder / f"build-{build.architecture}", _own(folder)
    _forget_another(place, own)
    c, cxx = compilers(build.architecture)
    configure = ["cmake", "-S", str(own), "-B", str(place), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DLLAMA_CPP={source}", f"-DRUNNER_MARCH={build.march}"]
    configure += [f"-DRUNNER_SOURCES=llama-cpp-python {version}"]
    configure += [f"-DCMAKE_C_COMPILER={c}", f"-DCMAKE_CXX_COMPILER={cxx}"]
    configure += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={build.architecture}"]
    if build.architecture == ARM:
        configure += [f"-DGGML_CPU_ARM_ARCH={build.march}"]
    else:
        configure += [f"-DGGML_{name}=ON" for name in X86_OPTIONS]
    make = ["cmake", "--build", str(place), "--target", RUNNER]
    make += ["--parallel", str(machine.threads())]
    with progress.task(f"compile {NAME} for {build.march}", 100, "%") as task:
        done = 0.0

        def told(line: str) -> None:
            nonlocal done
            if step := STEP.match(line):
                share = int(step[1]) / int(step[2] or 100) * 100
                task.advance(max(0.0, share - done))
                done = max(done, share)

        _run(configure, told)
        _run(make, told)
    return place / RUNNER


def _own(folder: Path) -> Path:
    """Our part of the sources, beside llama.cpp's: where this package is installed may differ from
    one compilation to the next, and the cache outlives them."""
    own = folder / "own"
    own.mkdir(exist_ok=True)
    for name, text in own_parts().items():
        write_atomic(own / name, text.encode("utf-8"))
    return own


def _forget_another(place: Path, own: Path) -> None:
    """CMake refuses a build folder that was configured for another place, or was moved."""
    settings = place / "CMakeCache.txt"
    if settings.is_file() and f"={own}\n" not in settings.read_text("utf-8", "replace"):
        shutil.rmtree(place)


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
            hint="a build goes on without it with bench.emulated_prompts: 0 in its recipe; "
            "bench --device takes a runner that you compiled with --runner FILE",
        )
