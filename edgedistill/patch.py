"""The difference between two model files, small enough to send, and the new file from the old one.

Two quantized files of one base hold mostly the same bytes at the same places. The difference is
new - old, byte by byte and modulo 256, through bzip2: mostly zeros, and it needs nothing on the
device but bzip2 and an addition. (bsdiff, Percival 2003, does the same behind its search for
places, which the headers tell us here.)
"""

from __future__ import annotations

import bz2
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from edgedistill.errors import ArtifactError
from edgedistill.gguf_header import read_header

CHUNK = 1 << 20
# (length in the new file, place in the old one or None): the new file from its beginning to its
# end. Where there is no place in the old file, the bytes are stored as they are.
Segment = tuple[int, int | None]


def segments(old: Path, new: Path) -> list[Segment]:
    """Which bytes of a new GGUF file go with which of an old one: tensors by name, where they have
    the same type and shape.

    Raises:
        ArtifactError: one of the two is not a GGUF file.
    """
    before, after = read_header(old).by_name, read_header(new).by_name
    found: list[Segment] = []
    at = 0
    for info in sorted(after.values(), key=lambda info: info.offset):
        match = before.get(info.name)
        if match is None or (match.type, match.shape) != (info.type, info.shape):
            continue
        # What lies before a tensor goes with what lies before it there: headers are alike, too.
        gap = info.offset - at
        raw = max(0, gap - match.offset)
        found += [(raw, None), (gap - raw, match.offset - gap + raw), (info.bytes, match.offset)]
        at = info.offset + info.bytes
    rest = new.stat().st_size - at
    return _joined([*found, (rest, None)])


def _joined(parts: Sequence[Segment]) -> list[Segment]:
    """The same segments, neighbours that go on in the old file made one, empty ones left out."""
    joined: list[Segment] = []
    for length, place in parts:
        if not length:
            continue
        last = joined[-1] if joined else None
        if last and (
            place is None if last[1] is None else place is not None and place == last[1] + last[0]
        ):
            joined[-1] = (last[0] + length, last[1])
        else:
            joined.append((length, place))
    return joined


def write_patch(old: Path, new: Path, parts: Sequence[Segment], into: IO[bytes]) -> int:
    """Write the compressed difference; returns its bytes."""
    squeezer, written = bz2.BZ2Compressor(), 0
    with old.open("rb") as before, new.open("rb") as after:
        for length, place in _pieces(parts):
            block = np.frombuffer(after.read(length), np.uint8)
            if place is not None:
                block = block - _read(before, place, length)
            written += into.write(squeezer.compress(block.tobytes()))
    return written + into.write(squeezer.flush())


def apply_patch(old: Path, parts: Sequence[Segment], patch: IO[bytes], into: Path) -> str:
    """Write the new file; returns its sha256 (hex), which the caller compares.

    Raises:
        ArtifactError: the patch is damaged, or was made for another file.
    """
    sha = hashlib.sha256()
    source = bz2.BZ2File(patch)
    try:
        with old.open("rb") as before, into.open("wb") as stream:
            for length, place in _pieces(parts):
                block = np.frombuffer(source.read(length), np.uint8)
                if len(block) != length:
                    raise ValueError("it ends too early")
                if place is not None:
                    block = block + _read(before, place, length)
                stream.write(block.tobytes())
                sha.update(block.tobytes())
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the patch's
        _refuse(into, str(error), error)
    return sha.hexdigest()


def _pieces(parts: Sequence[Segment]) -> Iterator[Segment]:
    """Segments cut into pieces of at most CHUNK bytes."""
    for length, place in parts:
        for start in range(0, length, CHUNK):
            yield min(CHUNK, length - start), None if place is None else place + start


def _read(stream: IO[bytes], place: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    stream.seek(place)
    found = np.frombuffer(stream.read(length), np.uint8)
    if len(found) != length:
        raise ValueError("it names a place that the old file has not")
    return found


def _refuse(where: Path, why: str, cause: Exception | None = None) -> NoReturn:
    raise ArtifactError(
        f"the update is damaged: {why}", where=where.name, hint="get the update file again"
    ) from cause
