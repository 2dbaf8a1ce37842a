"""The boundary to llama.cpp's own converter, for architectures that are not in families.py.

Its scripts are in no package: a llama.cpp checkout (or the vendor folder of llama-cpp-python's
source) is named by an environment variable. They run in a child process (converter_child.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from edgedistill.artifacts import is_full
from edgedistill.errors import MissingTool, RuntimeFailure, UsageError
from edgedistill.machine import child_environment

VARIABLE = "EDGEDISTILL_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
PACKAGE = "conversion"  # since 2026 the script's classes are in here
CONVERTER = "llama.cpp converter"  # how facts name it, before its digest
CONVERT_SECONDS = 2 * 3600.0
LAST_LINES = 8
HINT = (
    f"llama.cpp's own converter may know it: set {VARIABLE} to a llama.cpp checkout "
    f"(a folder with {SCRIPT}), and build again"
)


def checkout() -> Path | None:
    """The llama.cpp checkout that the user named, or None.

    Raises:
        UsageError: there is no converter in the folder named.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if not is_checkout(folder):
        raise UsageError(
            f"{VARIABLE} names a folder without {SCRIPT} and {PACKAGE}/",
            where=str(folder),
            hint="name the root of a llama.cpp checkout of 2026 or later",
        )
    return folder


def is_checkout(folder: Path) -> bool:
    """Whether the converter is in it."""
    return (folder / SCRIPT).is_file() and (folder / PACKAGE).is_dir()


def converter_digest(folder: Path) -> str:
    """sha256 (short) of the converter's own code, and of the checkout's gguf package, which it
    writes with."""
    known = hashlib.sha256()
    ours = sorted((folder / PACKAGE).glob("*.py")), sorted((folder / "gguf-py").rglob("*.py"))
    for file in [folder / SCRIPT, *ours[0], *ours[1]]:
        known.update(file.name.encode() + b"\0" + file.read_bytes())
    return known.hexdigest()[:16]


def convert(
    folder: Path,
    checkpoint: Path,
    destination: Path,
    encoding: str,
    seconds: float = CONVERT_SECONDS,
) -> None:
    """Write `destination` from the checkpoint folder, without a tokenizer.

    Raises:
        RuntimeFailure: the converter refused, died, or took longer than `seconds`.
        MissingTool: it needs a package that is not installed. OSError: the disk is full.
    """
    command = [sys.executable, "-m", "edgedistill.converter_child", str(folder)]
    command += [str(checkpoint), "--outtype", encoding.lower(), "--outfile", str(destination)]
    environment = child_environment() | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure(
            f"llama.cpp's converter was not done after {seconds:g} s", where=str(checkpoint)
        ) from error
    if done.returncode == 0 and destination.is_file():
        return
    lines = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if last.startswith("ModuleNotFoundError: No module named"):
        raise MissingTool(
            f"llama.cpp's converter needs a package: {last.split(': ', 1)[1]}",
            hint='in the checkout: pip install -e ".[converter]"; some models need more',
        )
    if is_full(destination.parent):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
    said = "".join(f"\n    {line}" for line in lines[-LAST_LINES:])
    raise RuntimeFailure(
        f"llama.cpp's converter cannot convert this checkpoint; its last lines:{said}",
        where=str(checkpoint),
        hint="choose another student.weights",
    )
