"""JSON files of ours that are read again months later, by another version: what they have around
their contents, and what is said of one that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError

OURS = "edgedistill-"  # how each of our kinds begins
GGUF = b"GGUF"  # how a model does


@dataclass(frozen=True)
class Kept:
    """A kind of file: `noun` ("result"), its fields that may not be missing, and what makes it."""

    kind: str
    version: int
    noun: str
    parts: Sequence[str]
    hint: str

    def read(self, file: Path) -> dict[str, Any]:
        """Its fields.

        Raises:
            ArtifactError: it cannot be read or is cut off, or as `fields`.
        """
        try:
            value = _parsed(file)
        except OSError as error:
            raise self.refused(file, f"it cannot be read: {error.strerror}") from error
        except _IsModel as error:
            raise self.refused(file, f"it is a model, and no {self.noun} of one") from error
        except (ValueError, RecursionError) as error:
            what = f"it is incomplete, cut off or damaged: {error}"
            raise self.refused(file, what, f"make it again: {self.hint}") from error
        return self.fields(file, value)

    def fields(self, file: Path, value: Any) -> dict[str, Any]:
        """Those of a file that was read already, and holds `value`.

        Raises:
            ArtifactError: it is of another kind or version, or lacks one.
        """
        if not isinstance(value, dict) or value.get("kind") != self.kind:
            raise self.refused(file, f"it is no {self.noun}: its kind is not {self.kind}")
        if value.get("version") != self.version:
            raise self._of_version(file, value.get("version"))
        if missing := [name for name in ("kind", "version", *self.parts) if name not in value]:
            raise self.refused(file, f"it lacks {', '.join(missing)}")
        return value

    def refused(self, file: Path, what: str, hint: str | None = None) -> ArtifactError:
        """The error that says so of a file."""
        return ArtifactError(what, where=str(file), hint=hint or self.hint)

    def _of_version(self, file: Path, version: object) -> ArtifactError:
        what, hint = f"it is of version {version}, and this reads {self.version}", self.hint
        if isinstance(version, int):
            newer = version > self.version
            hint = (
                "it was made by a newer edgedistill: update this one"
                if newer
                else (f"it was made by an older edgedistill, so make it again: {self.hint}")
            )
        return self.refused(file, what, hint)


class _IsModel(ValueError):
    """It begins as GGUF files do."""


def _parsed(file: Path) -> Any:
    """What a JSON file holds. It is opened once, since it may be a pipe; a model, which may have
    many GB, is told by its first bytes."""
    with file.open("rb") as stream:
        start = stream.read(len(GGUF))
        if start == GGUF:
            raise _IsModel
        return json.loads((start + stream.read()).decode("utf-8"))


@dataclass(frozen=True)
class Held:
    """What a whole JSON file holds, and its kind, "" where it tells none."""

    value: Any
    kind: str

    @property
    def is_foreign(self) -> bool:
        """Whether it is of none of our kinds."""
        return not self.kind.startswith(OURS)


def held_by(file: Path) -> Held | None:
    """What it holds, whichever kind it is of; None where it cannot be read or is cut off, so that
    this is not known."""
    try:
        value = _parsed(file)
    except (OSError, ValueError):
        return None
    except RecursionError:  # none of ours nests so deep
        return Held(None, "")
    return Held(value, str(value.get("kind", "")) if isinstance(value, dict) else "")
