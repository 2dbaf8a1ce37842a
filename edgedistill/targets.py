"""Token targets of many rows in one file: which tokens another model finds likely, and how likely.

A safetensors file: `ids` int32 [N, k] and `logprobs` float32 [N, k] (alignment.Aligned of all rows,
one behind the other), `known` bool [N], `offsets` int64 [rows + 1], `log_likelihood` float32 [rows]
(NaN where it is not known) and `rows` uint8, the row IDs as a JSON list. Written and
read a row at a time, so that no more than that is in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from edgedistill.alignment import Aligned, Ids, Known, Logprobs, tail
from edgedistill.errors import ArtifactError, DatasetError

SHOWN_REASONS = 3
FORMAT = "edgedistill-targets-1"
STREAMED = ("ids", "logprobs", "known")
ALIGNMENT = 8  # bytes; of where a safetensors file's values begin


@dataclass(frozen=True, eq=False)
class RowTargets:
    """Targets of one row's n answer tokens, the stop token last: `ids` int32 [n, k] (-1: unused),
    `logprobs` float32 [n, k] (nats, highest first), `known` bool [n]. `log_likelihood`: mean of the
    other model's log-probabilities (nats a token of its own) of the answer, or NaN."""

    ids: Ids
    logprobs: Logprobs
    known: Known
    log_likelihood: float

    @property
    def tail(self) -> Logprobs:
        """Probability [n] of what is not listed."""
        return tail(self.logprobs)


@dataclass
class Coverage:
    """How much of what is supervised has a target. `unknown` counts rows without any, by reason."""

    rows: int = 0
    tokens: int = 0
    known: int = 0
    known_mass: float = 0.0
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the supervised tokens, stop tokens included, with a target."""
        return self.known / self.tokens if self.tokens else 0.0

    @property
    def mean_known_mass(self) -> float:
        """Mean probability that a target lists; the rest is its tail."""
        return self.known_mass / self.known if self.known else 0.0

    def add(self, aligned: Aligned, why: str | None) -> None:
        self.rows += 1
        self.tokens += len(aligned.known)
        self.known += int(aligned.known.sum())
        self.known_mass += float((1 - tail(aligned.logprobs[aligned.known])).sum())
        if not aligned.known.any():
            self.unknown[why or "its tokens cannot be aligned"] += 1

    def facts(self) -> dict[str, Any]:
        """For a stage's manifest."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "coverage": round(self.share, 6),
            "mean_known_mass": round(self.mean_known_mass, 6),
            "rows_without_targets": dict(sorted(self.unknown.items())),
        }


def require_coverage(
    coverage: Coverage, least: float, *, bound: str, where: str, hint: str
) -> None:
    """Refuse targets that tell too little; `bound` names the field of the recipe with `least`.

    Raises:
        DatasetError: fewer than `least` of the supervised tokens have a target.
    """
    if coverage.share >= least:
        return
    common = coverage.unknown.most_common(SHOWN_REASONS)
    why = "; ".join(f"{count} of {coverage.rows} rows: {reason}" for reason, count in common)
    raise DatasetError(
        f"{coverage.known} of {coverage.tokens} supervised tokens have targets (a share of "
        f"{coverage.share:.3f}), fewer than {bound} asks for ({least:g})"
        + (f": {why}" if why else ""),
        where=where,
        hint=hint,
    )


class TargetsWriter:
    """Writes targets to `file`, a row at a time; a context manager, at whose end the file is there,
    unless it ended with an error. `coverage` counts along."""

    def __init__(self, file: Path, k: int) -> None:
        self.coverage = Coverage()
        self._file, self._k = file, k
        self._rows: list[str] = []
        self._likelihoods: list[float] = []
        self._offsets = [0]
        self._open = contextlib.ExitStack()
        self._streams: dict[str, IO[bytes]] = {}

    def __enter__(self) -> TargetsWriter:
        for name in STREAMED:
            stream = tempfile.TemporaryFile(dir=self._file.parent)
            self._streams[name] = self._open.enter_context(stream)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            if error is None:
                self._finish()

    def add(
        self,
        row: str,
        aligned: Aligned,
        log_likelihood: float = math.nan,
        *,
        why: str | None = None,
    ) -> None:
        """Append a row; `why` tells why it has no targets, where it has none."""
        if aligned.ids.shape[1] != self._k:
            raise ValueError(f"targets of {aligned.ids.shape[1]} tokens, not of {self._k}")
        self._rows.append(row)
        self._likelihoods.append(log_likelihood)
        self._offsets.append(self._offsets[-1] + len(aligned.known))
        self.coverage.add(aligned, why)
        for name, stream in self._streams.items():
            stream.write(np.ascontiguousarray(getattr(aligned, name)).tobytes())

    def _finish(self) -> None:
        count, k = self._offsets[-1], self._k
        rows = json.dumps(self._rows).encode()
        spooled = self._streams
        # Wide values first: whoever maps the file wants them aligned.
        parts: list[tuple[str, str, list[int], IO[bytes]]] = [
            ("offsets", "I64", [len(self._offsets)], _spooled(self._offsets, np.int64)),
            ("log_likelihood", "F32", [len(self._rows)], _spooled(self._likelihoods, np.float32)),
            ("ids", "I32", [count, k], spooled["ids"]),
            ("logprobs", "F32", [count, k], spooled["logprobs"]),
            ("known", "BOOL", [count], spooled["known"]),
            ("rows", "U8", [len(rows)], io.BytesIO(rows)),
        ]
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
        at = 0
        for name, kind, shape, stream in parts:
            start, at = at, at + stream.seek(0, io.SEEK_END)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, at]}
            stream.seek(0)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        with self._file.open("wb") as made:
            made.write(len(text).to_bytes(8, "little") + text)
            for *_, stream in parts:
                shutil.copyfileobj(stream, made, 1 << 20)


def _spooled(values: list[Any], kind: type[np.generic]) -> IO[bytes]:
    return io.BytesIO(np.array(values, kind).tobytes())


class Targets:
    """Reads what TargetsWriter wrote; values of a row are read when they are asked for.

    Raises:
        ArtifactError: the file is not one of targets.
    """

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError

        self.file = file
        try:
            opened = _opened(file)
            if (opened.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            self._slices = {name: opened.get_slice(name) for name in STREAMED}
            self._offsets = opened.get_tensor("offsets").tolist()
            self._likelihoods = opened.get_tensor("log_likelihood")
            self.rows: tuple[str, ...] = tuple(json.loads(opened.get_tensor("rows").tobytes()))
            self.k = int(self._slices["ids"].get_shape()[1])
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                f"the targets cannot be read: {error}",
                where=str(file),
                hint="delete its folder; the next build makes it again",
            ) from error
        self._places = {row: place for place, row in enumerate(self.rows)}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, row: object) -> bool:
        return row in self._places

    @property
    def log_likelihood(self) -> Logprobs:
        """Of every row, in the order of `rows`; NaN where it is not known."""
        return np.asarray(self._likelihoods)

    def row(self, row: str) -> RowTargets:
        """Targets of the row with this ID; KeyError where there is none."""
        place = self._places[row]
        start, stop = self._offsets[place], self._offsets[place + 1]
        if start == stop:
            empty = Aligned.unknown(0, self.k)
            return RowTargets(empty.ids, empty.logprobs, empty.known, math.nan)
        ids, logprobs, known = (self._slices[name][start:stop] for name in STREAMED)
        return RowTargets(ids, logprobs, known, float(self._likelihoods[place]))


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(file), framework="np")
