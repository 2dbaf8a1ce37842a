"""Importance matrices: how large the input of each matrix is, column by column, so that quantizing
keeps what the input multiplies most. llama.cpp's GGUF imatrix format (tools/imatrix/imatrix.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError, MissingTool
from edgedistill.gguf_header import Header, TensorInfo, read_header

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SHOWN_NAMES = 3

Sums = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """`sums`: for each tensor, float32 [columns], the squares of its input summed over `counts`
    tokens; `chunk_count` texts of about `chunk_size` tokens from `datasets` were read."""

    sums: Mapping[str, Sums]
    counts: Mapping[str, float]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def mean(self, tensor: str) -> Sums:
        """What quantizing weighs the columns with: float32 [columns], the mean square of the input;
        ones where nothing was counted, as llama.cpp has it."""
        sums, count = self.sums[tensor], self.counts[tensor]
        return sums / np.float32(count) if count > 0 else np.ones_like(sums)


def write_importance(path: Path, importance: Importance) -> None:
    """Write the file that llama.cpp's own tools read (llama-quantize --imatrix).

    Raises:
        MissingTool: the package gguf is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingTool(
            "the package gguf is not installed", hint='in the checkout: pip install -e ".[build]"'
        ) from error
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(importance.datasets) or [""])  # GGUF has no empty arrays
    writer.add_uint32(CHUNKS, importance.chunk_count)
    writer.add_uint32(CHUNK_SIZE, importance.chunk_size)
    for name in sorted(importance.sums):
        writer.add_tensor(name + SUMS, np.asarray(importance.sums[name], np.float32))
        writer.add_tensor(name + COUNTS, np.array([importance.counts[name]], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_importance(path: Path) -> Importance:
    """Read a GGUF imatrix, ours or llama.cpp's.

    Raises:
        ArtifactError: no imatrix, or one that is damaged, empty, or of a mixture of experts.
    """
    header = read_header(path)
    if header.keys.get("general.type") != "imatrix":
        _refuse(path, "this is no importance matrix: its general.type is not 'imatrix'")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    if not names or {n + end for n in names for end in (SUMS, COUNTS)} != set(tensors):
        _refuse(path, "this importance matrix does not hold sums and counts for each tensor")
    sums, counts = {}, {}
    for name in names:
        sums[name] = _values(path, tensors[name + SUMS])
        count = _values(path, tensors[name + COUNTS])
        if count.size != 1:
            _refuse(path, f"{name} has {count.size} counts: a mixture of experts is not supported")
        counts[name] = float(count[0])
    return Importance(sums, counts, *_told(path, header))


def require_fit(importance: Importance, path: Path, model: Header) -> None:
    """Prove that an importance matrix, read from `path`, belongs to a model of this header.

    Every matrix of the model's blocks must be there; embedding and head may be absent.

    Raises:
        ArtifactError: a tensor is missing, of another length, or not the model's.
    """
    columns = {t.name: t.columns for t in model.tensors if len(t.shape) > 1}
    absent = sorted(n for n in columns if _multiplies(n) and n not in importance.sums)
    foreign = sorted(n for n in importance.sums if n not in columns)
    if absent or foreign:
        what = f"lacks {_listed(absent)}" if absent else f"has {_listed(foreign)} besides"
        _refuse(path, f"this importance matrix is of another model: it {what}")
    for name, sums in importance.sums.items():
        if len(sums) != columns[name]:
            _refuse(
                path,
                f"this importance matrix is of another model: {name} has {len(sums)} columns "
                f"here and {columns[name]} in the model",
            )


def _multiplies(name: str) -> bool:
    return name.startswith("blk.") and name.endswith(".weight") and "_norm." not in name


def _values(path: Path, tensor: TensorInfo) -> Sums:
    if tensor.type != "F32":
        _refuse(path, f"{tensor.name} is {tensor.type}, not F32")
    found = np.fromfile(path, "<f4", tensor.bytes // 4, offset=tensor.offset)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        _refuse(path, f"{tensor.name} has a value that is no sum of squares")
    return found


def _told(path: Path, header: Header) -> tuple[tuple[str, ...], int, int]:
    keys: Mapping[str, Any] = header.keys
    datasets, chunks, size = (keys.get(k) for k in (DATASETS, CHUNKS, CHUNK_SIZE))
    if not (isinstance(datasets, list) and isinstance(chunks, int) and isinstance(size, int)):
        _refuse(path, f"this importance matrix lacks {DATASETS}, {CHUNKS} or {CHUNK_SIZE}")
    return tuple(str(name) for name in datasets if name), chunks, size


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _refuse(path: Path, what: str) -> NoReturn:
    raise ArtifactError(what, where=str(path), hint="measure it anew on the model to be quantized")
