"""Which tensors of a Hugging Face checkpoint become which tensors of a GGUF file, and how.

Values are read and converted a block of rows at a time, so memory stays far below the model's size.
Names, types and the order of rows are those of llama.cpp's convert_hf_to_gguf.py --outtype f16, or
f32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError, MissingTool
from edgedistill.families import BY_SOURCE, Family, known_names, rope, rope_factors, unsupported

BLOCK_BYTES = 16 << 20  # float32 bytes of one block of rows
HEAD = "lm_head.weight"
NUMBERS: Mapping[str, type[np.float16] | type[np.float32]] = {"F32": np.float32, "F16": np.float16}
LIMITS = {np.float16: 65520.0, np.float32: float("inf")}  # from here on a value rounds to infinity
Encoding = Literal["F16", "F32"]  # of matrices; the rest is always f32

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """One GGUF tensor and where its values are. `heads`: its rows are reordered in so many heads,
    because llama.cpp's "llama" architecture rotates neighbouring pairs and Hugging Face halves.
    `offset` is added to its values. `constant`: the values themselves, where the config has them.
    """

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    dtype: type[np.float16] | type[np.float32]
    heads: int | None = None
    offset: float = 0.0
    constant: tuple[float, ...] | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def blocks(self) -> Iterator[Values]:
        """The GGUF values, a block of rows at a time.

        Raises:
            ArtifactError: a value is not finite in f16.
        """
        if self.constant is not None:
            yield np.array(self.constant, self.dtype)
            return
        for start, stop in _row_ranges(self.shape, self.heads):
            values = _read(self.file, self.source, start, stop)
            if self.heads is not None:
                values = _interleaved(values, self.shape[0] // self.heads)
            if self.offset:
                values = values.astype(np.float32, copy=False) + np.float32(self.offset)
            # Extremes of float32 are far faster to find than f16 is to look through.
            bound = LIMITS[self.dtype]
            if not (values.min() > -bound and values.max() < bound):  # false of NaN, too
                raise ArtifactError(
                    f"tensor {self.source} has a value that is not finite in "
                    f"{np.dtype(self.dtype)}",
                    where=str(self.file),
                    hint="training diverged, or the model needs bf16, which this export lacks",
                )
            yield np.ascontiguousarray(values.astype(self.dtype, copy=False))

    def in_checkpoint_order(self, values: Values) -> Values:
        """GGUF values [rows, ...] with their rows as the checkpoint has them."""
        if self.heads is None:
            return np.ascontiguousarray(values)
        head, rest = self.shape[0] // self.heads, values.shape[1:]
        pairs = values.reshape(-1, head // 2, 2, *rest).swapaxes(1, 2)
        return np.ascontiguousarray(pairs.reshape(-1, *rest))


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder as llama.cpp sees it. `config` is its config.json."""

    family: Family
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name."""
        return self.family.architecture

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors if tensor.constant is None)

    @property
    def rope(self) -> Mapping[str, Any]:
        """RoPE parameters with `rope_theta` and `rope_type`, whichever way the config says it."""
        return rope(self.config, self.family.rope_theta)


def matrices(layout: Layout) -> dict[str, tuple[str, int, int]]:
    """GGUF name -> (parameter, rows, columns) of every matrix that is quantized."""
    return {
        tensor.name: (tensor.source, tensor.shape[0], tensor.shape[1])
        for tensor in layout.tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    }


def read_layout(folder: Path, encoding: Encoding = "F16") -> Layout:
    """The layout of a checkpoint folder (config.json and safetensors), matrices in `encoding`.

    Raises:
        ArtifactError: another architecture, RoPE scaling or number type than can be exported, or a
            tensor that llama.cpp has no name for.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = _family(config, folder)
    for what in unsupported(family, config):
        _refuse(folder, what)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[family.architecture], config["num_hidden_layers"])
    tensors = []
    for source, file in _sources(folder).items():
        if source == HEAD and config.get("tie_word_embeddings"):
            continue  # llama.cpp uses the embedding where there is no head
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            _refuse(folder, f"architecture {family.architecture} has no GGUF name for {source}")
        shape, number = _header(file, source)
        if number not in NUMBERS:
            _refuse(file, f"tensor {source} is {number}; only {', '.join(NUMBERS)} can be exported")
        matrix = len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")
        dtype = NUMBERS[encoding] if matrix else np.float32
        offset = family.norm_offset if name.endswith("norm.weight") else 0.0
        heads = _heads(family, config, source)
        tensors.append(Tensor(name, source, file, shape, dtype, heads, offset))
    return Layout(family, config, (*tensors, *_constants(config, folder)))


def read_plain_tensors(folder: Path, architecture: str) -> list[Tensor]:
    """Tensors of a checkpoint of any architecture that llama.cpp has a name for, as they are: its
    converter may have stored them so, or changed."""
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers", 0))
    found = []
    for source, file in _sources(folder).items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        shape, kind = _header(file, source)
        if name is not None and kind in NUMBERS:
            found.append(Tensor(name, source, file, shape, np.float32))
    return found


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    found = (config.get("architectures") or [None])[0]
    if found not in BY_SOURCE:
        _refuse(folder, f"architecture {found} cannot be exported to GGUF, only {known_names()}")
    return BY_SOURCE[found]


def _constants(config: Mapping[str, Any], folder: Path) -> Iterator[Tensor]:
    for name, values in rope_factors(config).items():
        constant = tuple(values.tolist())
        file = folder / "config.json"
        yield Tensor(name, name, file, values.shape, np.float32, constant=constant)


def _sources(folder: Path) -> dict[str, Path]:
    """File of each tensor, by the tensor's name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in listed.items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        _refuse(folder, f"there is no {file.name}")
    with _opened(file) as opened:
        return dict.fromkeys(opened.keys(), file)


def _header(file: Path, source: str) -> tuple[tuple[int, ...], str]:
    with _opened(file) as opened:
        found = opened.get_slice(source)
        return tuple(found.get_shape()), str(found.get_dtype())


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingTool(
            "the package safetensors is not installed",
            hint='in the checkout: pip install -e ".[build]"',
        ) from error
    return safe_open(str(file), framework="np")


def _read(file: Path, source: str, start: int, stop: int) -> Values:
    # Opened anew for each block: closing unmaps the pages that were read.
    with _opened(file) as opened:
        return np.asarray(opened.get_slice(source)[start:stop])


def _heads(family: Family, config: Mapping[str, Any], source: str) -> int | None:
    if not family.permuted:
        return None
    heads: int = config["num_attention_heads"]
    if source.endswith(("q_proj.weight", "q_proj.bias")):
        return heads
    if source.endswith(("k_proj.weight", "k_proj.bias")):
        return int(config.get("num_key_value_heads") or heads)
    return None


def _row_ranges(shape: tuple[int, ...], heads: int | None) -> Iterator[tuple[int, int]]:
    rows = shape[0]
    step = max(1, BLOCK_BYTES // (prod(shape[1:]) * 4))
    if heads is not None:
        head = rows // heads
        step = max(head, step - step % head)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _interleaved(values: Values, head: int) -> Values:
    """Rows of each head from (first halves, second halves) to neighbouring pairs."""
    rest = values.shape[1:]
    return values.reshape(-1, 2, head // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def _refuse(where: Path, what: str) -> NoReturn:
    raise ArtifactError(what, where=str(where), hint="choose another student.weights")
