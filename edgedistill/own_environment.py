"""Environments of our own: a virtual environment for packages that cannot live beside ours.

Each is made from a list in `environments/` that pins every package of it, below the user's cache
folder and once for all workspaces. `environment.json` is written last: without it a folder is torn
and is made again. A virtual environment cannot be moved, so it is made where it stays.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import venv
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.artifacts import digest_of, is_full, storing, write_json
from edgedistill.errors import ArtifactError, MissingTool, RuntimeFailure, StorageError
from edgedistill.progress import Progress
from edgedistill.weights.cache import cache_folder, locked

LISTS = Path(__file__).resolve().parent / "environments"
COMPLETE = "environment.json"
INSTALL_SECONDS = 3600.0
LAST_LINES = 8
# The list says it in a comment, because pip has no way to.
PYTHONS = re.compile(r"^# for Python 3\.(\d+) to 3\.(\d+)$", re.MULTILINE)
# What pip and urllib3 print when the index cannot be reached at all.
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|ReadTimeoutError|"
    r"Failed to establish|Temporary failure in name resolution|getaddrinfo failed"
)
NO_SPACE = re.compile(r"No space left on device|\[Errno 28\]|WinError 112")


@dataclass(frozen=True)
class Pins:
    """A list of pinned packages (pip's requirements format) and the Python 3 minors it is for."""

    file: Path
    packages: tuple[str, ...]
    minors: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def digest(self) -> str:
        """sha256 of the packages: comments and order change nothing."""
        return digest_of(sorted(self.packages))


@dataclass(frozen=True)
class OwnEnvironment:
    """A complete environment: its folder and its Python."""

    folder: Path
    python: Path


def read_pins(file: Path) -> Pins:
    """The list in `file`; `LISTS / "<name>.txt"` is one of ours.

    Raises:
        ArtifactError: a package without an exact version.
    """
    text = file.read_text("utf-8")
    lines = (line.strip() for line in text.splitlines())
    packages = tuple(line for line in lines if line and not line.startswith(("#", "--")))
    loose = [line for line in packages if "==" not in line and " @ " not in line]
    if loose:
        raise ArtifactError(f"not pinned: {', '.join(loose)}", where=str(file))
    told = PYTHONS.search(text)
    return Pins(file, packages, (int(told[1]), int(told[2])) if told else None)


def environments_folder() -> Path:
    """Where environments are kept: beside the fetched weights in the user's cache."""
    return cache_folder().parent / "environments"


def folder_of(pins: Pins, root: Path | None = None) -> Path:
    """Other packages, another minor Python or another platform make another folder."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = digest_of([sorted(pins.packages), minor, sysconfig.get_platform()])[:12]
    return (root or environments_folder()) / f"{pins.name}-{key}"


def find(pins: Pins, root: Path | None = None) -> OwnEnvironment | None:
    """The complete environment of `pins`, or None when it is absent or torn."""
    made = _environment(folder_of(pins, root))
    # is_file() also follows the link to the Python it was made with, which may be gone.
    return made if (made.folder / COMPLETE).is_file() and made.python.is_file() else None


def _environment(folder: Path) -> OwnEnvironment:
    return OwnEnvironment(
        folder, folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    )


def prepare(pins: Pins, progress: Progress, root: Path | None = None) -> OwnEnvironment:
    """Find the environment of `pins`, or make it: venv, then that environment's own pip.

    Raises:
        MissingTool: this Python cannot make it, or pip cannot install the packages.
        StorageError: no space or no permission.
    """
    found = find(pins, root)
    if found is not None:
        return found
    _refuse_other_python(pins)
    folder = folder_of(pins, root)
    with storing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with locked(lock, f"the packages of {pins.name}", progress):
            return find(pins, root) or _make(pins, folder, progress)


def _make(pins: Pins, folder: Path, progress: Progress) -> OwnEnvironment:
    progress.note(f"{pins.name} gets an environment of its own, once: {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, symlinks=os.name != "nt", with_pip=True)
    except subprocess.CalledProcessError as error:
        _refuse(folder, "this Python cannot make a virtual environment", [str(error)])
    made = _environment(folder)
    _install(made, pins, progress)
    packages = _installed(folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    write_json(folder / COMPLETE, {"pins": pins.digest, "packages": packages, "bytes": size})
    progress.note(f"{pins.name}: {len(packages)} packages, {size / 1e6:.0f} MB")
    return made


def _install(made: OwnEnvironment, pins: Pins, progress: Progress) -> None:
    """No package is built here, so none runs code of its own and none needs a compiler."""
    words = ["install", "--requirement", str(pins.file), "--only-binary", ":all:"]
    words += ["--no-compile", "--progress-bar", "off", "--no-warn-script-location"]
    process = subprocess.Popen(
        _pip_command(made, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_pip_environment(),
    )
    said: deque[str] = deque(maxlen=200)
    timer = threading.Timer(INSTALL_SECONDS, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        label = f"install {pins.name}"
        with process.stdout, progress.task(label, len(pins.packages), "packages") as task:
            for line in process.stdout:
                said.append(line.rstrip())
                if line.startswith(("Collecting ", "Requirement already satisfied")):
                    task.advance()
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if code != 0:
        _refuse_install(made.folder, pins, list(said))


def _refuse_install(folder: Path, pins: Pins, said: list[str]) -> NoReturn:
    text = "\n".join(said)
    if NO_SPACE.search(text) or is_full(folder):
        raise StorageError(
            f"cannot install {pins.name}: {os.strerror(errno.ENOSPC)}",
            where=str(folder),
            hint="free some space, or choose another disk with EDGEDISTILL_CACHE",
        )
    if NO_NETWORK.search(text):
        raise MissingTool(
            f"the packages of {pins.name} are not here yet, and no package index can be reached",
            where=str(folder),
            hint="connect to the network, or set pip's index, proxy or find-links; "
            "then run the same command again",
        )
    _refuse(folder, f"pip cannot install the packages of {pins.name}", said)


def _refuse(folder: Path, what: str, said: Sequence[str]) -> NoReturn:
    raise MissingTool(
        what + _last(said),
        where=str(folder),
        hint="what pip says above is the reason; nothing of it is kept, the next run starts afresh",
    )


def _refuse_other_python(pins: Pins) -> None:
    own = sys.version_info.minor
    if pins.minors is not None and not pins.minors[0] <= own <= pins.minors[1]:
        known = f"3.{pins.minors[0]} to 3.{pins.minors[1]}"
        raise MissingTool(
            f"the packages of {pins.name} are pinned for Python {known}, this is 3.{own}",
            where=sys.executable,
            hint=f"install edgedistill with a Python from {known}",
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise MissingTool(
            "this Python cannot make a virtual environment: it has no ensurepip",
            where=sys.executable,
            hint="Debian, Ubuntu: apt install python3-venv",
        )


def _pip_command(made: OwnEnvironment, *words: str) -> list[str]:
    # -I: neither our PYTHONPATH nor the user's own packages are seen; -u: lines come as printed.
    command = [str(made.python), "-I", "-u", "-X", "utf8", "-m", "pip", *words]
    return [*command, "--no-input", "--disable-pip-version-check"]


def _pip_environment() -> dict[str, str]:
    """The user's settings (index, proxy, certificates), but for those that install elsewhere."""
    elsewhere = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON"}
    kept = {name: value for name, value in os.environ.items() if name not in elsewhere}
    return {**kept, "PIP_USER": "0"}


def _installed(folder: Path) -> list[str]:
    """Name and version of every package there, but for pip, which came with Python."""
    base = {"base": str(folder), "platbase": str(folder)}
    where = {sysconfig.get_path(kind, "venv", vars=base) for kind in ("purelib", "platlib")}
    found = {(one.name, one.version) for one in metadata.distributions(path=sorted(where))}
    return sorted(f"{name}=={version}" for name, version in found if name != "pip")


def run_script(
    environment: OwnEnvironment,
    script: Path,
    request: Mapping[str, Any],
    timeout_seconds: float,
) -> Any:
    """Run a script of ours with that environment's Python; returns what it answers.

    The script reads `request` as one line of JSON from stdin, ends when stdin is closed (we are
    gone), and writes `{"ok": ...}` or `{"error": ..., "errno": ...}` to the file it is given as
    its one argument. What it prints is for the error message.

    Raises:
        RuntimeFailure: it refused, died, or took longer than `timeout_seconds`.
        OSError: the disk refused.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        answer, printed = Path(scratch, "answer.json"), Path(scratch, "printed.txt")
        with printed.open("wb") as stream:
            process = subprocess.Popen(
                [str(environment.python), "-I", "-X", "utf8", str(script), str(answer)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        what = f"{script.stem}: {request['do']}"
        try:
            ending = _wait(process, request, timeout_seconds)
        finally:
            process.kill()
            process.wait()
        if not answer.is_file():
            said = printed.read_text("utf-8", "replace").splitlines()
            raise RuntimeFailure(f"{what} {ending}{_last(said)}", where=str(environment.folder))
        value = json.loads(answer.read_text("utf-8"))
    if "ok" in value:
        return value["ok"]
    if value.get("errno") is not None:
        raise OSError(value["errno"], os.strerror(value["errno"]), value.get("file"))
    raise RuntimeFailure(str(value["error"]), where=value.get("where"))


def _wait(
    process: subprocess.Popen[bytes], request: Mapping[str, Any], timeout_seconds: float
) -> str:
    """How it ended, in words."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has died at once; its last lines tell why
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    try:
        code = process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout_seconds:g} s"
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
    return f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'} and no answer"


def _last(said: Sequence[str]) -> str:
    lines = [line for line in said if line.strip()][-LAST_LINES:]
    return "; its last lines:" + "".join(f"\n    {line}" for line in lines) if lines else ""
