"""Several results, each with a short name, and what forbids to lay them side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.bundle_result import is_bundle, read_bundle
from edgedistill.errors import ArtifactError
from edgedistill.kept_file import held_by
from edgedistill.result_file import KIND, Result, read_result

MAKE = "make a result with `edgedistill bench MODEL --out FILE`"


@dataclass(frozen=True)
class Named:
    """A result, its file or bundle, and the shortest name by which it is told from the others."""

    name: str
    file: Path
    result: Result


@dataclass(frozen=True)
class _Read:
    """A file or bundle as it was named first; `result` is None where it is of another kind, and
    `is_foreign` where it is of none of ours."""

    path: Path
    result: Result | None
    is_foreign: bool = False


def read_all(paths: Sequence[Path]) -> list[Named]:
    """The results in files, bundles and folders, in the order given; of a folder that is no bundle
    all of `*.json` and all bundles in it, by name. What is named twice is read once.

    Raises:
        ArtifactError: one of them cannot be read, is incomplete, or is no result, or there is none.
    """
    return read_noted(paths)[0]


def read_noted(
    paths: Sequence[Path], baseline: Path | None = None
) -> tuple[list[Named], list[str]]:
    """As read_all, the `baseline` first; with notes on the files that `paths` name more than once,
    and on the JSON files of folders that are none of ours."""
    held: dict[Path, _Read] = {}  # by where a file is: a result may be large, and is parsed once
    first, times, notes = dict[Path, Path](), Counter[Path](), list[str]()
    if baseline is not None:
        held[baseline.resolve()] = _named(baseline)
    for path in paths:
        inside = _inside(path)
        for file, read in inside.items():
            place = file.resolve()
            passed_over = read is _named and place in held and held[place].result is None
            if place not in held or passed_over:  # which is an error now that it is named itself
                held[place] = read(file)
            first.setdefault(place, file)
            times[place] += held[place].result is not None
        notes += _left_out(path, [held[file.resolve()] for file in inside])
    twice = [place for place, count in times.items() if count > 1]
    told = [f"{first[place]} is given twice, and stands here once" for place in twice]
    found = [(each.path, each.result) for each in held.values() if each.result is not None]
    names = _names([path for path, _ in found])
    named = [Named(name, *each) for name, each in zip(names, found, strict=True)]
    return named, [*told, *dict.fromkeys(notes)]


def _inside(path: Path) -> dict[Path, Callable[[Path], _Read]]:
    """What a path names, and how each is read."""
    if not path.is_dir() or is_bundle(path):
        return {path: _named}
    bundles = sorted(each for each in path.glob("*") if each.is_dir() and is_bundle(each))
    files = sorted(path.glob("*.json"))
    return {**dict.fromkeys(files, _beside_others), **dict.fromkeys(bundles, _named)}


def _named(path: Path) -> _Read:
    return _Read(path, read_bundle(path) if path.is_dir() else read_result(path))


def _beside_others(file: Path) -> _Read:
    """In a folder lie files of `judge` and `evaluate`, too, which say by themselves what they are,
    and files of others."""
    held = held_by(file)
    if held is None or held.kind == KIND:
        return _Read(file, read_result(file, held))
    return _Read(file, None, held.is_foreign)


def _left_out(path: Path, inside: Sequence[_Read]) -> list[str]:
    """A note on the files of a folder that are none of ours.

    Raises:
        ArtifactError: it has no result.
    """
    if not any(each.result is not None for each in inside):
        raise ArtifactError(
            "this folder has no result (*.json) and no bundle in it", where=str(path), hint=MAKE
        )
    foreign = [each.path.name for each in inside if each.is_foreign]
    return [f"{path}: {', '.join(foreign)}: no results, and left out"] if foreign else []


def _names(files: Sequence[Path]) -> list[str]:
    """The name of file or bundle, with its folder where another has the same name."""
    short = [file.name if file.is_dir() else file.stem for file in files]
    taken = Counter(short)
    return [
        name if taken[name] == 1 else (file if file.is_dir() else file.with_suffix("")).as_posix()
        for name, file in zip(short, files, strict=True)
    ]


def require_comparable(named: Sequence[Named]) -> None:
    """That all were asked the same prompts and judged by the same check. A result without prompts
    has nothing of either, and may stand beside any. Of a bundle and an older result it is not known
    (`unmatched`).

    Raises:
        ArtifactError: two differ; it names both and the difference.
    """
    asked = [each for each in named if each.result.token_mix is not None]
    for place, each in enumerate(asked):
        for earlier in asked[:place]:
            _require_same(earlier, each)


def unmatched(named: Sequence[Named]) -> list[str]:
    """Which of them cannot be known to be asked the same prompts, in words."""
    asked = [each for each in named if each.result.token_mix is not None]
    bundles = [each for each in asked if _digest(each) is None]
    older = [
        each for each in asked
        if _digest(each) is not None and "dataset" not in _part(each.result.token_mix)
    ]  # fmt: skip
    if not bundles:
        return []
    return [
        f"{each.name}: its file is from before results kept their dataset, so whether it was asked "
        f"the prompts of {bundles[0].name} is not known"
        for each in older
    ]


def _require_same(first: Named, other: Named) -> None:
    a, b = _part(first.result.token_mix), _part(other.result.token_mix)
    if not _may_be_same(a, b):
        raise _unlike(first, other, f"they answer other prompts: {_mix(a)}, and {_mix(b)}")
    a, b = _part(first.result.check), _part(other.result.check)
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if changed:
        told = (f"{name} {_told(a, name)}, and {_told(b, name)}" for name in changed)
        raise _unlike(first, other, f"their checks differ: {'; '.join(told)}")


def _may_be_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """By the digest of what was asked; where one is of a bundle, which has none, by the dataset's
    and the number of prompts. A dataset that is not told may be any."""
    if a.get("digest") is not None and b.get("digest") is not None:
        return bool(a["digest"] == b["digest"])
    if a.get("prompts") != b.get("prompts"):
        return False
    return "dataset" not in a or "dataset" not in b or bool(a["dataset"] == b["dataset"])


def _digest(each: Named) -> str | None:
    digest: str | None = _part(each.result.token_mix).get("digest")
    return digest


def _part(value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if value is None else value


def _told(check: Mapping[str, Any], name: str) -> str:
    return repr(check[name]) if name in check else "none"


def _mix(mix: Mapping[str, Any]) -> str:
    name = "dataset" if mix.get("digest") is None else "digest"
    return f"{mix.get('prompts')} of {mix.get('source')} ({name} {str(mix.get(name))[:12]})"


def _unlike(first: Named, other: Named, what: str) -> ArtifactError:
    return ArtifactError(
        f"{first.name} and {other.name} cannot be compared: {what}",
        where=str(other.file),
        hint="measure both again with the same --recipe, or the same --prompts and --sample",
    )
