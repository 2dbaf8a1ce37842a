"""What a workspace holds, and how it is cleaned.

A workspace has one folder a stage run (`<stage>-<key>`), `traces.db` with every teacher answer ever
paid for, and `lock.db`, which keeps two builds apart.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.artifacts import MANIFEST, storing
from edgedistill.checks import kept_in
from edgedistill.errors import StorageError
from edgedistill.recipe import Recipe
from edgedistill.target import Target

STAGE_FOLDER = re.compile(r"[a-z][a-z0-9_-]*-[0-9a-f]{16}")
TRACES = "traces.db"
LOCK = "lock.db"
LOCK_WAIT_SECONDS = 0.5
Plan = Callable[[Recipe, Sequence[Target]], Iterable[tuple[str, str, Path]]]


@dataclass(frozen=True)
class Held:
    """One stage folder: its size, the age of its last change, and the recipes that lead to it."""

    folder: Path
    stage: str
    complete: bool
    bytes: int
    age_seconds: float
    recipes: tuple[str, ...]


def reached(
    plan: Plan, recipes: Sequence[Recipe], targets: Sequence[Target]
) -> dict[Path, set[str]]:
    """The stage folders that builds of these recipes would reuse or go on in, with the recipes."""
    found: dict[Path, set[str]] = {}
    for recipe in recipes:
        for _, _, folder in plan(recipe, targets):
            found.setdefault(folder.resolve(), set()).add(recipe.name)
    return found


def holds(root: Path, reached: Mapping[Path, set[str]]) -> list[Held]:
    """Every stage folder below `root`, oldest first. Other files are not ours and not listed."""
    if not root.is_dir():
        return []
    now = time.time()
    found = [
        _held(path, reached.get(path.resolve(), set()), now)
        for path in root.iterdir()
        if path.is_dir() and STAGE_FOLDER.fullmatch(path.name)
    ]
    return sorted(found, key=lambda held: -held.age_seconds)


def traces_bytes(root: Path) -> int:
    """Size of the trace store with its write-ahead log; 0 when there is none."""
    return sum(path.stat().st_size for path in _traces(root))


def _traces(root: Path) -> list[Path]:
    """The store and what SQLite keeps beside it; a copy that a user made is not ours."""
    files = (root / f"{TRACES}{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))
    return [file for file in files if file.is_file()]


def unreached(held: Iterable[Held]) -> list[Held]:
    """What gc removes: folders no recipe leads to. A torn one that a build would go on in stays."""
    return [one for one in held if not one.recipes]


def gc(root: Path, condemned: Iterable[Held], *, traces: bool = False) -> int:
    """Remove these stage folders, and the trace store only when asked; returns bytes freed.

    Raises:
        StorageError: a build is using the workspace, or a folder cannot be removed.
    """
    freed = 0
    with locked(root):
        for held in condemned:
            _remove(held.folder)
            freed += held.bytes
        if traces:
            freed += traces_bytes(root)
            for path in _traces(root):
                path.unlink()
    return freed


def keeping(recipe: Recipe, root: Path) -> Recipe:
    """The recipe, whose check, where it asks a judge, keeps what that said beside the teacher's
    answers."""
    return recipe.model_copy(update={"check": kept_in(recipe.check, root / TRACES)})


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """One build or gc at a time. SQLite's lock ends with its process, on every system.

    Raises:
        StorageError: another process holds it.
    """
    with storing(root):
        root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            # Long enough for an `in_use` elsewhere, which holds it for an instant.
            lock = sqlite3.connect(root / LOCK, timeout=LOCK_WAIT_SECONDS, isolation_level=None)
            stack.callback(lock.close)
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise _not_locked(root, error) from error
        yield


def in_use(root: Path) -> bool:
    """Whether a build or gc runs here now. A lock that cannot be read is left to the next build."""
    try:
        address = f"{(root / LOCK).absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0)) as lock:
            lock.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        return error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return False


def _not_locked(root: Path, error: sqlite3.Error) -> StorageError:
    if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(
            "another build is using this workspace",
            where=str(root),
            hint="wait for it to end, or give this one its own with --workspace and --dist",
        )
    return StorageError(
        f"the workspace cannot be locked: {error}",
        where=str(root / LOCK),
        hint="make the folder writable, remove this file when no build runs, or choose another "
        "folder with --workspace",
    )


def _held(folder: Path, recipes: set[str], now: float) -> Held:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    changed = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
    return Held(
        folder=folder,
        stage=folder.name.rpartition("-")[0],
        complete=(folder / MANIFEST).is_file(),
        bytes=sum(file.st_size for file in files),
        age_seconds=max(0.0, now - changed),
        recipes=tuple(sorted(recipes)),
    )


def _remove(folder: Path) -> None:
    try:
        # Without its manifest a folder is torn: an interrupted removal is never read as complete.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(
            f"cannot be removed: {error.strerror}", where=str(folder), hint="close what uses it"
        ) from error
