"""Answers of a model that are kept as they come, so that a run that was killed goes on.

One file a model and setting, one line an answer. A line that was torn is left out, and asked again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from edgedistill.artifacts import digest_of, storing

FOLDER = "evaluations"  # in the workspace


class Kept:
    """Answers by what was asked. A context manager.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.file = root / FOLDER / f"{digest_of(dict(identity))[:16]}.jsonl"
        self._answers: dict[str, Any] = {}
        with storing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            held = self.file.read_bytes() if self.file.is_file() else b""
            self._stream: BinaryIO = self.file.open("ab", buffering=0)
            if held and not held.endswith(b"\n"):
                self._stream.write(b"\n")
        for line in held.splitlines():
            found = _line(line)
            if found is not None:
                self._answers[found[0]] = found[1]

    def get(self, kind: str, asked: Sequence[Any]) -> Any:
        """What was answered before, or None."""
        return self._answers.get(_key(kind, asked))

    def put(self, kind: str, asked: Sequence[Any], answer: Any) -> None:
        key = _key(kind, asked)
        self._answers[key] = answer
        with storing(self.file):
            self._stream.write(json.dumps([key, answer]).encode() + b"\n")

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


def _key(kind: str, asked: Sequence[Any]) -> str:
    return digest_of([kind, *asked])


def _line(text: bytes) -> tuple[str, Any] | None:
    try:
        key, answer = json.loads(text)
    except (ValueError, TypeError):
        return None
    return str(key), answer
