"""A result: what one sitting of `edgedistill bench MODEL` measured, in a file that is read again
months later, beside others, by another version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import write_json
from edgedistill.errors import ArtifactError
from edgedistill.measures import Measure

KIND, VERSION = "edgedistill-result", 1
BOUNDS = ("low", "high")
PARTS = ("kind", "version", "made", "edgedistill", "model", "device", "load", "settings", "figures")


@dataclass(frozen=True)
class Result:
    """`figures` by name (docs/bench.md says what each is). `load` and `conditions` say what the
    device was in. `token_mix`, `check` and `likeness` are None where no prompts were given. Of a
    server `model` has no file, sha256 or bytes (None), but the model IDs that `answered`; a far
    one's `load` and `conditions`, and what its `device` is, are None, too."""

    made: str  # UTC, ISO 8601
    edgedistill: str
    model: Mapping[str, Any]  # name, file, sha256, bytes, format, parameters, bundle
    device: Mapping[str, Any]  # address, facts of the machine, runtime
    load: Mapping[str, Any]
    conditions: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Measure]
    token_mix: Mapping[str, Any] | None = None
    check: Mapping[str, Any] | None = None
    likeness: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the file has it. JSON has no nan: the bounds of an unknown interval are null."""
        figures = {name: _written(asdict(each)) for name, each in self.figures.items()}
        return {"kind": KIND, "version": VERSION, **asdict(self), "figures": figures}


def write_result(result: Result, file: Path) -> None:
    """Write it whole, or not at all."""
    write_json(file, result.to_json())


def read_result(file: Path) -> Result:
    """Read a result file.

    Raises:
        ArtifactError: it cannot be read, is cut off, is no result, or is of a later version.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise _refused(file, f"it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _refused(file, f"it is cut off or damaged: {error}") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise _refused(file, f"it is no result: its kind is not {KIND}")
    if value.get("version") != VERSION:
        raise _refused(file, f"it is of version {value.get('version')}, and this reads {VERSION}")
    if missing := [name for name in PARTS if name not in value]:
        raise _refused(file, f"it lacks {', '.join(missing)}")
    known = {name: value[name] for name in Result.__dataclass_fields__ if name in value}
    try:
        figures = {name: _figure(each) for name, each in value["figures"].items()}
        return Result(**{**known, "figures": figures})
    except (TypeError, AttributeError) as error:
        raise _refused(file, f"it is damaged: {error}") from error


def _written(figure: dict[str, Any]) -> dict[str, Any]:
    unknown = {name: None for name in BOUNDS if math.isnan(figure[name])}
    return {**figure, **unknown}


def _figure(written: dict[str, Any]) -> Measure:
    unknown = {name: math.nan for name in BOUNDS if written.get(name, math.nan) is None}
    return Measure(**{**written, **unknown})


def _refused(file: Path, what: str) -> ArtifactError:
    return ArtifactError(
        what, where=str(file), hint="results are made by `edgedistill bench MODEL --out FILE`"
    )
