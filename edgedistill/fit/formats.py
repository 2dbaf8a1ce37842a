"""The exact arithmetic of each number format: what a weight is after quantize and dequantize.

Formats without a search are plain torch. IQ4_NL and the 32-weight formats with an importance are a
search in torch, and on a CPU the library's own, which is faster. K formats are searched by the
library alone. On processors other than x86-64 the library does all of llama.cpp's formats:
compilers fuse its multiplications and additions there, which rounds once less. A search at every
training step would be most of the training, so `freeze` runs it once and `quantize_on` rounds to
the scales it found, in torch on the weight's own device.

A name such as "int4-b32" is ONNX Runtime's MatMulNBits; `importance` means nothing to it.
`weight` is what the runtime's quantizer reads: of an f16 file, the f16 values.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgedistill import ggml
from edgedistill.fit import onnx_formats
from edgedistill.fit.block_formats import BLOCK, BLOCK_FORMATS, Steps
from edgedistill.fit.k_formats import K_FORMATS
from edgedistill.fit.searched_formats import SEARCHED_FORMATS
from edgedistill.number_formats import FORMATS, ONNX_NAME, onnx_format

CHUNK = 2**18  # weights at a time: 1 MB for each temporary; 2^18 and 2^20 took alike
CUDA_CHUNK = 2**26
FUSED = platform.machine().lower() not in ("x86_64", "amd64")
CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Grid:
    """The scales a matrix is rounded to: what `freeze` found. `group` weights of a row share one.

    `searched`: with an importance, or IQ4_NL, whose codes are rounded by another rule.
    """

    name: str
    group: int
    searched: bool
    steps: Steps | None  # None: a plain cast

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on another device."""
        if self.steps is None:
            return self
        moved = (None if part is None else part.to(device) for part in self.steps)
        return Grid(self.name, self.group, self.searched, Steps(*moved))


def quantize_dequantize(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Float32 [rows, columns] after ggml_quantize_chunk and to_float of ggml type `name`, or
    MatMulNBitsQuantizer and DequantizeLinear, bit for bit (NaN, which llama.cpp refuses, apart).
    `importance` [columns] is llama.cpp's imatrix row.

    On a GPU, K formats are searched on the CPU; see `freeze` for training there.

    Raises:
        ValueError: no such format, its block does not divide `columns` (see
            number_formats.usable), or `weight` is not float32.
        MissingTool: llama.cpp's library is needed, and not installed.
    """
    _check(weight, name)
    weight = weight.detach()
    searched = is_searched(name, importance is not None)
    library = searched or (FUSED and name in BLOCK_FORMATS)
    if library and (name in K_FORMATS or weight.device.type == "cpu"):
        given = None if importance is None else importance.detach().cpu().numpy()
        made = ggml.quantize_dequantize(weight.cpu().numpy(), name, given)
        return torch.from_numpy(made).to(weight.device)
    if name in CASTS:
        return weight.to(CASTS[name]).to(torch.float32, copy=name == "F32")  # never the weight
    made_here = torch.empty_like(weight, memory_format=torch.contiguous_format)
    group = _group(name)
    for rows in _parts(weight):
        part = weight[rows]
        steps = _steps(part, name, importance)
        made_here[rows] = _values(part, name, searched, group, steps)
    return made_here


def is_searched(name: str, weighed: bool) -> bool:
    """Whether scales of this format are searched: too slow to do at each step of a training."""
    if name in K_FORMATS:
        return True
    return name in SEARCHED_FORMATS and (weighed or name not in BLOCK_FORMATS)


def fake_quantize(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """`quantize_dequantize` whose gradient with respect to `weight` is the identity.

    For a training loop of one's own; fitting itself does the same once a step for all parts of a
    batch (latent.py).
    """
    made: Tensor = _StraightThrough.apply(weight, quantize_dequantize, (name, importance))
    return made


def freeze(weight: Tensor, name: str, importance: Tensor | None = None) -> Grid:
    """The scales `quantize_dequantize` finds for this weight, on its device: 1/16 to 1/8 of the
    weight's bytes (int4-b16: 3/16).

    Raises:
        ValueError, MissingTool: as `quantize_dequantize`.
    """
    _check(weight, name)
    weight = weight.detach()
    searched = name not in K_FORMATS and is_searched(name, importance is not None)
    if name in CASTS:
        return Grid(name, 1, searched, None)
    if name in K_FORMATS:
        return Grid(name, _group(name), searched, _k_steps(weight, name, importance))
    found = [_steps(weight[rows], name, importance) for rows in _parts(weight)]
    return Grid(name, _group(name), searched, _joined(found))


def quantize_on(weight: Tensor, grid: Grid) -> Tensor:
    """The weight rounded to the grid. On the weight that was frozen this is `quantize_dequantize`
    bit for bit, but that a K format's group of scale 0 may hold zeros of the other sign."""
    _check(weight, grid.name)
    if grid.steps is None:
        return quantize_dequantize(weight, grid.name)
    weight = weight.detach()
    made = torch.empty_like(weight, memory_format=torch.contiguous_format)
    groups = -(-weight.shape[1] // grid.group)
    for rows in _parts(weight):
        at = slice(rows.start * groups, rows.stop * groups)
        steps = Steps(*(None if part is None else part[at] for part in grid.steps))
        made[rows] = _values(weight[rows], grid.name, grid.searched, grid.group, steps)
    return made


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Not weight + (value - weight).detach(): float32 rounds that to another value."""

    @staticmethod
    def forward(context: Any, weight: Tensor, values: Any, given: tuple[Any, ...]) -> Tensor:
        made: Tensor = values(weight, *given)
        return made

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


def _group(name: str) -> int:
    """How many weights of a row share a scale."""
    if ONNX_NAME.fullmatch(name):
        return onnx_format(name).block
    return K_FORMATS[name].group if name in K_FORMATS else BLOCK


def _steps(rows: Tensor, name: str, importance: Tensor | None) -> Steps:
    if ONNX_NAME.fullmatch(name):
        return onnx_formats.steps(rows, onnx_format(name))
    if is_searched(name, importance is not None):
        return SEARCHED_FORMATS[name].steps(rows, importance)
    return BLOCK_FORMATS[name].steps(rows.reshape(-1, BLOCK))


def _values(rows: Tensor, name: str, searched: bool, group: int, steps: Steps) -> Tensor:
    if ONNX_NAME.fullmatch(name):
        return onnx_formats.values(rows, steps, onnx_format(name))
    x = rows.reshape(-1, group)
    if name in K_FORMATS:
        made = K_FORMATS[name].values(x, steps)
    elif searched:
        made = SEARCHED_FORMATS[name].values(x, steps)
    else:
        made = BLOCK_FORMATS[name].values(x, steps)
    return made.view_as(rows)


def _k_steps(weight: Tensor, name: str, importance: Tensor | None) -> Steps:
    given = None if importance is None else importance.detach().cpu().numpy()
    found = []
    for rows in _parts(weight):
        blocks = ggml.quantize(weight[rows].cpu().numpy(), name, given)
        stored = torch.from_numpy(blocks).view(-1, FORMATS[name].bytes_per_block)
        found.append(K_FORMATS[name].steps(stored.to(weight.device)))
    return _joined(found)


def _joined(found: list[Steps]) -> Steps:
    columns = zip(*found, strict=True)
    return Steps(*(None if column[0] is None else torch.cat(column) for column in columns))


def _parts(weight: Tensor) -> Iterator[slice]:
    """Slices of rows of about a chunk each."""
    rows, columns = weight.shape
    step = max(1, (CUDA_CHUNK if weight.is_cuda else CHUNK) // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _check(weight: Tensor, name: str) -> None:
    if not ONNX_NAME.fullmatch(name):
        if name not in FORMATS:
            raise ValueError(f"there is no number format '{name}'; known: {', '.join(FORMATS)}")
        block, columns = FORMATS[name].block, weight.shape[-1]
        if columns % block:
            raise ValueError(f"{columns} columns do not divide into {name}'s blocks of {block}")
    if weight.dtype != torch.float32 or weight.dim() != 2:
        raise ValueError(f"{name} is made of a float32 matrix, not {weight.dtype} {weight.shape}")
