"""Where recipes and targets are found: `recipes/` and `targets/` of the user's folder, then the
shipped ones (beside the package in a source checkout, inside it in an installed wheel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgedistill.errors import UsageError, did_you_mean

Kind = Literal["recipe", "target"]
DEFAULT_RECIPE = "support-sql"
DEFAULT_TARGET = "laptop"
SHIPPED = "shipped"  # where an entry is from
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """One recipe or target by name; `path` is its YAML file, `origin` "yours" or "shipped"."""

    name: str
    path: Path
    origin: str


def shipped_root() -> Path:
    """The folder that holds the shipped `recipes/` and `targets/`."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def entries(kind: Kind, here: Path | None = None) -> list[Entry]:
    """All recipes or targets by name; the user's own hides a shipped one of the same name."""
    yours = (here or Path.cwd()) / f"{kind}s"
    shipped = shipped_root() / f"{kind}s"
    found = {name: Entry(name, path, SHIPPED) for name, path in _scan(kind, shipped)}
    if yours.resolve() != shipped.resolve():
        found |= {name: Entry(name, path, "yours") for name, path in _scan(kind, yours)}
    return sorted(found.values(), key=lambda entry: entry.name)


def find(kind: Kind, name_or_path: str, here: Path | None = None) -> Path:
    """The YAML file of a recipe or target, by name or by path (a recipe also by its folder).

    Raises:
        UsageError: neither a known name nor a path that is there; the message suggests names.
    """
    known = {entry.name: entry.path for entry in entries(kind, here)}
    if name_or_path in known:
        return known[name_or_path]
    path = (here or Path.cwd()) / name_or_path
    if kind == "recipe" and path.is_dir():
        path = path / "recipe.yaml"
    if path.is_file():
        return path
    listed = f"known: {', '.join(known)}; or give the path of a {kind} file"
    raise UsageError(
        f"there is no {kind} '{name_or_path}'",
        hint=f"{did_you_mean(name_or_path, known)} {listed}".lstrip(),
    )


def named_or_all(kind: Kind, names: Sequence[str], here: Path | None = None) -> list[Path]:
    """The files of these recipes or targets; of all known ones when none is named.

    Raises:
        UsageError: as `find`.
    """
    if not names:
        return [entry.path for entry in entries(kind, here)]
    return [find(kind, name, here) for name in names]


def shown(path: Path) -> str:
    """A path as messages name it: relative to the current folder when it lies below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)


def _scan(kind: Kind, folder: Path) -> list[tuple[str, Path]]:
    if kind == "recipe":
        return [(path.parent.name, path) for path in sorted(folder.glob("*/recipe.yaml"))]
    return [(path.stem, path) for path in sorted(folder.glob("*.yaml"))]
