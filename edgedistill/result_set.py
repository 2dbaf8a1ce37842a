"""Several results, each with a short name, and what forbids to lay them side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError, UsageError
from edgedistill.result_file import Result, read_result

BUNDLE = "manifest.json"
MAKE = "make a result with `edgedistill bench MODEL --out FILE`"


@dataclass(frozen=True)
class Named:
    """A result, its file, and the shortest name by which it is told from the others."""

    name: str
    file: Path
    result: Result


def read_all(paths: Sequence[Path]) -> list[Named]:
    """The results in files and folders, in the order given; of a folder all of `*.json`, by name.
    What is named twice is read once.

    Raises:
        ArtifactError: one of them cannot be read, is incomplete, or is no result. UsageError: there
            is none.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _files(path):
            files.setdefault(file.resolve(), file)
    shown = list(files.values())
    results = [read_result(file) for file in shown]
    names = _names(shown)
    return [Named(*each) for each in zip(names, shown, results, strict=True)]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / BUNDLE).is_file():
        raise ArtifactError(
            "this is a bundle: its report has one sitting in one process, without the interval for "
            "another one and without the answers, so it cannot be compared",
            where=str(path),
            hint=f"measure it: edgedistill bench {path} --recipe NAME --out FILE",
        )
    found = sorted(path.glob("*.json"))
    if not found:
        raise UsageError("this folder has no result in it (*.json)", where=str(path), hint=MAKE)
    return found


def _names(files: Sequence[Path]) -> list[str]:
    """The file's name, with its folder where another has the same name."""
    stems = Counter(file.stem for file in files)
    return [
        file.stem if stems[file.stem] == 1 else str(file.with_suffix("").as_posix())
        for file in files
    ]


def require_comparable(named: Sequence[Named]) -> None:
    """That all were asked the same prompts and judged by the same check. A result without prompts
    has nothing of either, and may stand beside any.

    Raises:
        ArtifactError: two differ; it names both and the difference.
    """
    asked = [each for each in named if each.result.token_mix is not None]
    for each in asked[1:]:
        _require_same(asked[0], each)


def _require_same(first: Named, other: Named) -> None:
    a, b = _part(first.result.token_mix), _part(other.result.token_mix)
    if a.get("digest") != b.get("digest"):
        raise _unlike(first, other, f"they answer other prompts: {_mix(a)}, and {_mix(b)}")
    a, b = _part(first.result.check), _part(other.result.check)
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if changed:
        told = (f"{name} {_told(a, name)}, and {_told(b, name)}" for name in changed)
        raise _unlike(first, other, f"their checks differ: {'; '.join(told)}")


def _part(value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if value is None else value


def _told(check: Mapping[str, Any], name: str) -> str:
    return repr(check[name]) if name in check else "none"


def _mix(mix: Mapping[str, Any]) -> str:
    digest = str(mix.get("digest"))[:12]
    return f"{mix.get('prompts')} of {mix.get('source')} (digest {digest})"


def _unlike(first: Named, other: Named, what: str) -> ArtifactError:
    return ArtifactError(
        f"{first.name} and {other.name} cannot be compared: {what}",
        where=str(other.file),
        hint="measure both again with the same --recipe, or the same --prompts and --sample",
    )
