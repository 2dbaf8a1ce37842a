"""The boundary to libggml-base: its quantize and dequantize functions, called in this process.

They open no file and read no more than the arrays given, so no child process stands between. The
llama_cpp package is found, not imported: its import starts a backend.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill import machine
from edgedistill.errors import MissingTool
from edgedistill.number_formats import FORMATS, NumberFormat

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
NAMES = {"win32": ("ggml-base.dll", "libggml-base.dll"), "darwin": ("libggml-base.dylib",)}
PART = 2**18  # weights that one thread takes at a time


def quantize(weight: Floats, name: str, importance: Floats | None = None) -> Bytes:
    """ggml_quantize_chunk: [rows, columns] float32 to [rows, bytes of a row]. `importance` is
    [columns], the imatrix row that llama_model_quantize passes on.

    Raises:
        MissingTool: llama-cpp-python is not installed.
        ValueError: the arrays' shapes do not fit each other or the format.
    """
    number_format, weight, importance = _checked(weight, name, importance)
    made = np.empty((len(weight), _row_bytes(number_format, weight.shape[1])), np.uint8)

    def work(rows: slice) -> None:
        _quantize(number_format, weight[rows], made[rows], importance)

    _in_threads(work, weight)
    return made


def dequantize(blocks: Bytes, name: str, columns: int) -> Floats:
    """to_float of a type: [rows, bytes of a row] to [rows, columns].

    Raises:
        MissingTool: llama-cpp-python is not installed.
        ValueError: a row is not of `columns` weights of this format.
    """
    number_format = FORMATS[name]
    blocks = np.ascontiguousarray(blocks, np.uint8)
    if blocks.shape[1] != _row_bytes(number_format, columns):
        raise ValueError(f"rows of {blocks.shape[1]} bytes are not {columns} weights of {name}")
    made = np.empty((len(blocks), columns), np.float32)
    _in_threads(lambda rows: _dequantize(number_format, blocks[rows], made[rows]), made)
    return made


def quantize_dequantize(weight: Floats, name: str, importance: Floats | None = None) -> Floats:
    """`dequantize` of `quantize`, without the bytes of the whole matrix in between."""
    number_format, weight, importance = _checked(weight, name, importance)
    made = np.empty_like(weight)

    def work(rows: slice) -> None:
        part = weight[rows]
        blocks = np.empty((len(part), _row_bytes(number_format, part.shape[1])), np.uint8)
        _quantize(number_format, part, blocks, importance)
        _dequantize(number_format, blocks, made[rows])

    _in_threads(work, weight)
    return made


def block_size(name: str) -> tuple[int, int]:
    """Weights and bytes of a block, as the library itself says."""
    library, number = _library(), FORMATS[name].ggml_type
    return int(library.ggml_blck_size(number)), int(library.ggml_type_size(number))


def _checked(
    weight: Floats, name: str, importance: Floats | None
) -> tuple[NumberFormat, Floats, Floats | None]:
    number_format, columns = FORMATS[name], weight.shape[1]
    if columns % number_format.block:
        raise ValueError(f"{columns} columns do not divide into {name}'s blocks")
    if importance is not None:
        if importance.shape != (columns,):
            raise ValueError(f"an importance of shape {importance.shape} for {columns} columns")
        importance = np.ascontiguousarray(importance, np.float32)
    return number_format, np.ascontiguousarray(weight, np.float32), importance


def _row_bytes(number_format: NumberFormat, columns: int) -> int:
    return columns // number_format.block * number_format.bytes_per_block


def _quantize(made: NumberFormat, weight: Floats, into: Bytes, importance: Floats | None) -> None:
    importance_at = None if importance is None else importance.ctypes.data
    rows, columns = weight.shape
    _library().ggml_quantize_chunk(
        made.ggml_type, weight.ctypes.data, into.ctypes.data, 0, rows, columns, importance_at
    )


def _dequantize(made: NumberFormat, blocks: Bytes, into: Floats) -> None:
    _to_float(made.name)(blocks.ctypes.data, into.ctypes.data, into.size)


def _in_threads(work: Callable[[slice], None], matrix: Floats) -> None:
    """Call `work` with slices of the rows; the library runs without the interpreter's lock."""
    rows, columns = matrix.shape
    step = max(1, PART // max(1, columns))
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(machine.threads()) as pool:
        for _ in pool.map(work, parts):
            pass


@functools.cache
def _to_float(name: str) -> Any:
    special = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    stem = name.lower().removesuffix("_k") + "_K" * name.endswith("_K")
    found = getattr(_library(), special.get(name, f"dequantize_row_{stem}"))
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    found.restype = None
    return found


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(str(_path()))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk = library.ggml_quantize_chunk
    chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    chunk.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = count
    library.ggml_type_size.restype = ctypes.c_size_t
    return library


def _path() -> Path:
    package = importlib.util.find_spec("llama_cpp")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "lib"
        for name in NAMES.get(sys.platform, ("libggml-base.so",)):
            if (folder / name).is_file():
                return folder / name
    raise MissingTool(
        "llama.cpp's library ggml-base is not installed",
        hint='in the checkout: pip install -e ".[runtime]"',
    )
