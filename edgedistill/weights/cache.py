"""The folder for fetched weights: where it is, which of its files were verified, who may write."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from edgedistill.artifacts import digest_of, digest_of_file, write_atomic
from edgedistill.errors import EdgedistillError
from edgedistill.progress import Progress

CACHE_VARIABLE = "EDGEDISTILL_CACHE"


def cache_folder() -> Path:
    """$EDGEDISTILL_CACHE/weights, else edgedistill/weights in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser().absolute() / "weights"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "edgedistill" / "weights"


def size(path: Path) -> int:
    """Bytes of a file, 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def digest(path: Path, root: Path) -> str:
    """sha256 of a file; hashed again only when its size or time changed since the last time."""
    try:
        known = json.loads(_record(path, root).read_bytes())
        if known["stamp"] == _stamp(path):
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no record, or not one of ours: the file itself tells
    sha256 = digest_of_file(path)
    remember(path, sha256, root)
    return sha256


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _record(path: Path, root: Path) -> Path:
    return root / "verified" / f"{digest_of(str(path.resolve()))[:24]}.json"


def remember(path: Path, sha256: str, root: Path) -> None:
    record = {"path": str(path), "sha256": sha256, "stamp": _stamp(path)}
    with contextlib.suppress(OSError, EdgedistillError):  # only costs hashing it once more
        write_atomic(_record(path, root), json.dumps(record).encode())


@contextlib.contextmanager
def locked(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold a lock that the system takes back when this process dies."""
    with path.open("ab") as stream:
        waited = False
        while not _try_lock(stream):
            if not waited:
                progress.note(f"another process is fetching {name}; waiting for it")
            waited = True
            time.sleep(0.2)
        yield  # closing the file gives the lock back


if sys.platform == "win32":
    import msvcrt

    def _try_lock(stream: IO[bytes]) -> bool:
        stream.seek(0)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(stream: IO[bytes]) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
