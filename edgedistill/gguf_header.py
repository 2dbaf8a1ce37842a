"""What a GGUF file holds, read without llama.cpp: its keys, and each tensor's name, type and shape.

Strict and bounded, because a file can be damaged: nothing is read that the file cannot hold.
Source of the layout: ggml's docs/gguf.md; of the block sizes: ggml-common.h; of the fallbacks:
tensor_type_fallback in llama-quant.cpp.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.errors import ArtifactError

# Tensor type -> (number in the file, values of a block, bytes of a block).
TYPES: Mapping[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "F64": (28, 1, 8), "IQ1_M": (29, 256, 56), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I8", "I16", "I32", "I64", "F64")  # tables, never weights
QUANTIZED = tuple(name for name in TYPES if name not in (*FLOATS, *INTEGERS))
# What llama.cpp takes where a row is not a whole number of the type's blocks.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
                    "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
_NAMES = {number: name for name, (number, _, _) in TYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape`: as numpy has it, columns last; `offset`: of its data in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def bytes(self) -> int:
        return bytes_as(self.type, self.shape)


@dataclass(frozen=True)
class Header:
    """A GGUF file's keys and its tensors, in the file's order."""

    keys: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    @property
    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}


def bytes_as(type: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in that type; rows must be whole blocks (see `type_for`)."""
    _, values, size = TYPES[type]
    return prod(shape) // values * size


def type_for(type: str, columns: int) -> str | None:
    """What llama.cpp really makes of a matrix with rows of so many values when asked for `type`;
    None: it refuses."""
    if columns % TYPES[type][1] == 0:
        return type
    if type not in FALLBACKS and TYPES[type][1] > 32:
        return None
    smaller = FALLBACKS.get(type, type)
    return smaller if columns % TYPES[smaller][1] == 0 else "F16"


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        ArtifactError: missing, not GGUF, torn, or not what the format allows.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _Reader(path, m).header()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        what = getattr(error, "strerror", None) or "it is empty"
        raise ArtifactError(f"this GGUF file cannot be read: {what}", where=str(path)) from error


class _Reader:
    """A position in the mapped file that never goes past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            self._refuse("it does not start with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            self._refuse(f"its version is {version}, not 2 or 3")
        tensors, keys = self._count(24), self._count(12)
        found: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in found:
                self._refuse(f"the key {key!r} is there twice")
            found[key] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(tensors)]
        if len({name for name, *_ in infos}) < len(infos):
            self._refuse("two tensors have the same name")
        return Header(found, self._placed(infos, found.get("general.alignment", 32)))

    def _placed(
        self, infos: list[tuple[str, str, tuple[int, ...], int]], alignment: Any
    ) -> tuple[TensorInfo, ...]:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"its alignment is {alignment!r}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        placed = tuple(TensorInfo(name, kind, s, start + at) for name, kind, s, at in infos)
        for tensor in placed:
            if tensor.offset + tensor.bytes > len(self._data):
                self._refuse(f"the data of tensor {tensor.name} ends behind the file's end")
        return placed

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._refuse(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number, offset = self._number("I"), self._number("Q")
        kind = _NAMES.get(number)
        if kind is None:
            self._refuse(f"tensor {name!r} has the type {number}, which llama.cpp does not know")
        if not all(shape) or shape[-1] % TYPES[kind][1]:
            self._refuse(f"tensor {name!r} cannot have the shape {list(shape)} as {kind}")
        return name, kind, shape, offset

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            self._refuse(f"there is a key of the type {kind}, which GGUF does not have")
        element = self._number("I")
        if element in SCALARS:
            letter = SCALARS[element]
            count = self._count(struct.calcsize(letter))
            return list(
                struct.unpack(f"<{count}{letter}", self._take(count * struct.calcsize(letter)))
            )
        if element != STRING:
            self._refuse(f"there is an array of the type {element}, which llama.cpp does not read")
        return [self._text() for _ in range(self._count(8))]

    def _count(self, least: int) -> int:
        """A number of things of at least so many bytes each: no more than the file has room for."""
        count = int(self._number("Q"))
        if count * least > len(self._data) - self._at:
            self._refuse(f"it says that {count} things follow, which do not fit into it")
        return count

    def _text(self) -> str:
        # Token texts of some models are not UTF-8.
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self._take(struct.calcsize(letter)))[0]

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            self._refuse("it ends in the middle of its header")
        taken, self._at = self._data[self._at : end], end
        return taken

    def _refuse(self, what: str) -> NoReturn:
        raise ArtifactError(
            f"this is no sound GGUF file: {what}",
            where=str(self._path),
            hint="make or copy the file again",
        )
