"""The git commit that a folder is at, so that a figure is told by it months later.

The hash is read from git's own files (gitrepository-layout(5)), so that it is known where the
program git is not; whether something was changed since, and when it was committed, that one tells.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHORT = 9
ASKING_SECONDS = 20
DEPTH = 5  # references that name another


@dataclass(frozen=True)
class Commit:
    """`dirty`: a file that git knows was changed since. `committed`: ISO 8601, in the committer's
    own time zone. Both are None where the program git does not tell."""

    hash: str
    dirty: bool | None
    committed: str | None


def commit_of(folder: Path) -> Commit | None:
    """The commit of the repository that `folder` lies in, whether it is there yet or not. None
    outside of one, before its first commit, and where its files are not as expected."""
    try:
        found = _top(folder.resolve())
        held = None if found is None else _hash(found)
    except (OSError, ValueError):  # ValueError: bytes that are no text
        return None
    if found is None or held is None:
        return None
    status = _git(found, "status", "--porcelain", "--untracked-files=no")
    committed = _git(found, "show", "-s", "--format=%cI", held)
    return Commit(held, None if status is None else bool(status), committed or None)


def _top(folder: Path) -> Path | None:
    """The folder of a repository's or worktree's files."""
    return next((each for each in (folder, *folder.parents) if (each / ".git").exists()), None)


def _hash(top: Path) -> str | None:
    git = top / ".git"
    if git.is_file():  # of a worktree or submodule: "gitdir: PATH"
        git = top / git.read_text("utf-8").removeprefix("gitdir:").strip()
    common = git / "commondir"
    folders = [git, git / common.read_text("utf-8").strip()] if common.is_file() else [git]
    name = "HEAD"
    for _ in range(DEPTH):
        text = _reference(folders, name)
        if text is None or HASH.fullmatch(text):
            return text
        if not text.startswith("ref:"):
            return None
        name = text.removeprefix("ref:").strip()
    return None


def _reference(folders: list[Path], name: str) -> str | None:
    """What a reference holds: a file of its own goes before the packed ones."""
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text("utf-8").strip()
    packed = folders[-1] / "packed-refs"
    lines = packed.read_text("utf-8").splitlines() if packed.is_file() else []
    named = (line.split(" ", 1) for line in lines if line[:1] not in ("#", "^"))
    return next((held for held, *rest in named if rest == [name]), None)


def _git(top: Path, *words: str) -> str | None:
    """What the program git prints, or None where it is not there, fails or hangs."""
    program = shutil.which("git")
    if program is None:
        return None
    # A hook's GIT_DIR or GIT_INDEX_FILE would make it tell of another repository than _hash reads.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [program, "--no-optional-locks", "-C", str(top), *words], capture_output=True,
            text=True, encoding="utf-8", errors="replace", timeout=ASKING_SECONDS, env=outside,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
