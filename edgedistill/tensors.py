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

BLOCK_BYTES = 16 << 20  # float32 bytes of one block of rows
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
ROPE_TYPES = ("default", "linear")
HEAD = "lm_head.weight"
NUMBERS: Mapping[str, type[np.float16] | type[np.float32]] = {"F32": np.float32, "F16": np.float16}
Encoding = Literal["F16", "F32"]  # of matrices; the rest is always f32

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """One GGUF tensor and where its values are. `heads`: its rows are reordered in so many heads,
    because llama.cpp's "llama" architecture rotates neighbouring pairs and Hugging Face halves."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    dtype: type[np.float16] | type[np.float32]
    heads: int | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def blocks(self) -> Iterator[Values]:
        """The GGUF values, a block of rows at a time.

        Raises:
            ArtifactError: a value is not finite in f16.
        """
        for start, stop in _row_ranges(self.shape, self.heads):
            values = _read(self.file, self.source, start, stop)
            if self.heads is not None:
                values = _interleaved(values, self.shape[0] // self.heads)
            with np.errstate(over="ignore"):
                block = values.astype(self.dtype, copy=False)
            if not np.isfinite(block).all():
                raise ArtifactError(
                    f"tensor {self.source} has a value that is not finite in {block.dtype}",
                    where=str(self.file),
                    hint="training diverged, or the model needs bf16, which this export lacks",
                )
            yield np.ascontiguousarray(block)

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

    architecture: str
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def rope(self) -> Mapping[str, Any]:
        """RoPE parameters with `rope_theta` and `rope_type`, whichever way the config says it."""
        own = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = own.get("rope_type", own.get("type", "default"))
        theta = own.get("rope_theta", self.config.get("rope_theta", 10000.0))
        return {**own, "rope_type": kind, "rope_theta": theta}


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
    layout = Layout(_architecture(config, folder), config, ())
    _refuse_unsupported(layout, folder)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[layout.architecture], config["num_hidden_layers"])
    tensors = []
    for source, file in _sources(folder).items():
        if source == HEAD and config.get("tie_word_embeddings"):
            continue  # llama.cpp uses the embedding where there is no head
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            _refuse(folder, f"architecture {layout.architecture} has no GGUF name for {source}")
        shape, number = _header(file, source)
        if number not in NUMBERS:
            _refuse(file, f"tensor {source} is {number}; only {', '.join(NUMBERS)} can be exported")
        matrix = len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")
        dtype = NUMBERS[encoding] if matrix else np.float32
        tensors.append(Tensor(name, source, file, shape, dtype, _heads(layout, source)))
    return Layout(layout.architecture, config, tuple(tensors))


def _architecture(config: Mapping[str, Any], folder: Path) -> str:
    found = (config.get("architectures") or [None])[0]
    if found not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        _refuse(folder, f"architecture {found} cannot be exported to GGUF yet, only {known}")
    return ARCHITECTURES[found]


def _refuse_unsupported(layout: Layout, folder: Path) -> None:
    kind = layout.rope["rope_type"]
    if kind not in ROPE_TYPES:
        known = " and ".join(ROPE_TYPES)
        _refuse(folder, f"RoPE type {kind} cannot be exported to GGUF yet, only {known}")
    if layout.config.get("use_sliding_window"):
        _refuse(folder, "sliding-window attention cannot be exported to GGUF yet")


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


def _heads(layout: Layout, source: str) -> int | None:
    if layout.architecture != "llama":
        return None
    heads: int = layout.config["num_attention_heads"]
    if source.endswith(("q_proj.weight", "q_proj.bias")):
        return heads
    if source.endswith(("k_proj.weight", "k_proj.bias")):
        return int(layout.config.get("num_key_value_heads") or heads)
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
