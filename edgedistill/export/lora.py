"""Export the adapter alone, as a LoRA GGUF: for apps that hold the base model already.

llama.cpp adds it to the base's matrices when it runs (`--lora FILE`); nothing is merged and
nothing rounded a second time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgedistill.adapter_file import A, B, require_fit
from edgedistill.artifacts import (
    Adapter,
    Checkpoint,
    Identity,
    Student,
    digest_of_file,
    run_stage,
    tool_versions,
)
from edgedistill.errors import ArtifactError
from edgedistill.export import export
from edgedistill.export.gguf import VERSION, writer_class
from edgedistill.gguf_header import Header, read_header
from edgedistill.names import name_parts, size_label
from edgedistill.progress import Progress
from edgedistill.recipe import Recipe
from edgedistill.weights import folder_or_hub, locate

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, SUFFIXES = "base_model.model.", {".lora_A.weight": A, ".lora_B.weight": B}
TYPES = ("F32", "F16", "Q8_0")
BLOCK = 32  # values of a Q8_0 block
# What peft can do to a layer and llama.cpp's adapters cannot say.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, [], ()),
    "alpha_pattern": (None, {}),
}
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class LoraFile:
    """The adapter as a GGUF file that fits the base it was trained on."""

    folder: Path
    digest: str
    model: Path


@dataclass(frozen=True)
class Origin:
    """What the file says about where it comes from: the recipe, the base's name and licence (SPDX),
    the sha256 of the base's GGUF file and the digest of the adapter."""

    recipe: str
    base: str
    licence: str
    base_sha256: str
    adapter_digest: str


def export_lora(
    adapter: Adapter,
    student: Student,
    base: Path,
    name: str,
    out: Path,
    progress: Progress,
    type: str = "F16",
) -> LoraFile:
    """Stage "lora": the adapter as GGUF; `base` is the GGUF file that the student was made from.

    Raises:
        ArtifactError: the adapter holds what llama.cpp cannot apply.
        RuntimeFailure: it does not fit `base`.
    """
    base_sha256 = digest_of_file(base)
    identity = Identity(
        stage="lora",
        version=1,
        spec={"name": name, "type": type, "base": student.stem, "licence": student.licence},
        inputs={"adapter": adapter.digest, "student": student.digest, "base": base_sha256},
        tools=tool_versions("gguf"),
    )

    def work(folder: Path) -> dict[str, Any]:
        origin = Origin(name, student.name, student.licence, base_sha256, adapter.digest)
        file = folder / lora_name(student.stem, read_header(base), name, type)
        return {"file": file.name, **write_lora(adapter.folder, base, file, origin, type)}

    done = run_stage(identity, out, progress, work)
    return LoraFile(done.folder, done.digest, done.folder / done.facts["file"])


def lora_base(recipe: Recipe, student: Student, out: Path, progress: Progress) -> Path:
    """The GGUF file that an adapter alone is for: the one that the student was made from, or else
    the student itself, exported."""
    weights = recipe.student.weights
    if folder_or_hub(weights) is None and not student.layers:
        return locate(weights, progress).path
    whole = Checkpoint(student.folder, student.digest)
    base = export(whole, student, recipe.name, out, progress).model
    progress.note(f"the base of this adapter is {student.title}; as a GGUF file: {base}")
    return base


def lora_name(base: str, header: Header, finetune: str, type: str) -> str:
    """The conventional name with "LoRA" before the end (ggml's docs/gguf.md)."""
    parameters = sum(int(np.prod(info.shape)) for info in header.tensors)
    parts = name_parts(base, parameters)
    label = parts.size_label or size_label(parameters)
    words = (parts.base, label, parts.finetune, finetune, VERSION, type, "LoRA")
    return "-".join(word for word in words if word) + ".gguf"


def write_lora(
    adapter: Path, base: Path, destination: Path, origin: Origin, type: str = "F16"
) -> dict[str, Any]:
    """Write peft's folder `adapter` as a GGUF adapter for the GGUF file `base`.

    The tensors are bit-identical to those of llama.cpp's convert_lora_to_gguf.py. `type`: F32, F16
    or Q8_0; with Q8_0 a tensor whose rows are not whole blocks of 32 becomes F16.

    Returns: rank, alpha, tensors, parameters.

    Raises:
        ArtifactError: the adapter holds what llama.cpp cannot apply, or a value is not finite.
        RuntimeFailure: it does not fit `base`.
    """
    if not (adapter / CONFIG).is_file():
        _refuse(adapter, "every weight was trained (distill.tuning is full): there is no adapter")
    config = json.loads((adapter / CONFIG).read_text("utf-8"))
    _refuse_unsupported(config, adapter)
    header = read_header(base)
    writer = writer_class()(path=None, arch=header.architecture)
    _add_keys(writer, header, origin, config, type)
    pieces = list(_pieces(adapter / WEIGHTS, header, type))
    for piece in pieces:
        writer.add_tensor_info(piece.name, piece.stored, piece.dtype, piece.bytes, piece.raw)
    try:
        writer.write_header_to_file(destination)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for piece in pieces:
            stream.write(piece.values().tobytes())
            writer.write_padding(stream, piece.bytes)
    finally:
        writer.close()
    require_fit(destination, base)
    parameters = sum(int(np.prod(piece.shape)) for piece in pieces)
    return {
        "rank": config["r"],
        "alpha": _alpha(config),
        "type": type,
        "tensors": len(pieces),
        "parameters": parameters,
    }


@dataclass(frozen=True)
class _Piece:
    """One half of a pair: its GGUF name, where its values are, and how they are stored. `heads`:
    rows of B are reordered in so many heads, as the base's own rows are (see tensors.py)."""

    name: str
    file: Path
    source: str
    shape: tuple[int, ...]
    type: str
    heads: int | None

    def values(self) -> Values:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize
        from safetensors import safe_open

        with safe_open(str(self.file), framework="np") as tensors:
            values = tensors.get_tensor(self.source).astype(np.float32)
        if self.heads is not None:
            half = self.shape[0] // self.heads // 2
            values = values.reshape(self.heads, 2, half, -1).swapaxes(1, 2).reshape(self.shape)
        with np.errstate(over="ignore"):
            stored = quantize(values, GGMLQuantizationType[self.type])
        if not np.isfinite(values).all() or (self.type == "F16" and not np.isfinite(stored).all()):
            _refuse(self.file, f"{self.source} has a value that is not finite in {self.type}")
        return np.ascontiguousarray(stored)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the writer's terms: bytes where the type has blocks."""
        return self.shape if self.type != "Q8_0" else (self.shape[0], self.bytes // self.shape[0])

    @property
    def dtype(self) -> Any:
        return {"F32": np.float32, "F16": np.float16, "Q8_0": np.uint8}[self.type]

    @property
    def raw(self) -> Any:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.type] if self.type == "Q8_0" else None

    @property
    def bytes(self) -> int:
        count = int(np.prod(self.shape))
        return (
            count // BLOCK * (BLOCK + 2) if self.type == "Q8_0" else count * self.dtype().itemsize
        )


def _pieces(file: Path, header: Header, type: str) -> Iterator[_Piece]:
    import gguf
    from safetensors import safe_open

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = int(header.keys[f"{header.architecture}.block_count"])
    names = gguf.get_tensor_name_map(numbers[header.architecture], layers)
    with safe_open(str(file), framework="np") as tensors:
        shapes = {
            name: tuple(tensors.get_slice(name).get_shape())
            for name in tensors.keys()  # noqa: SIM118 - not a dict
        }
    for source, shape in shapes.items():
        suffix = next((s for s in SUFFIXES if source.endswith(s)), None)
        if suffix is None or not source.startswith(PREFIX):
            _refuse(file, f"{source} is neither lora_A nor lora_B of a linear layer")
        own = source.removeprefix(PREFIX).removesuffix(suffix)
        name = names.get_name(own)
        if name is None:
            _refuse(file, f"architecture {header.architecture} has no GGUF name for {own}")
        kind = "F16" if type == "Q8_0" and shape[-1] % BLOCK else type
        heads = _heads(header, own) if SUFFIXES[suffix] == B else None
        yield _Piece(f"{name}.weight{SUFFIXES[suffix]}", file, source, shape, kind, heads)


def _heads(header: Header, layer: str) -> int | None:
    if header.architecture != "llama":
        return None
    heads = int(header.keys["llama.attention.head_count"])
    if layer.endswith("q_proj"):
        return heads
    if layer.endswith("k_proj"):
        return int(header.keys.get("llama.attention.head_count_kv", heads))
    return None


def _add_keys(
    writer: Any, header: Header, origin: Origin, config: Mapping[str, Any], type: str
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, Keys, LlamaFileType

    base = origin.base.rsplit("/", 1)[-1]
    kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(config))
    writer.add_name(f"{base} {origin.recipe} LoRA")
    writer.add_version(VERSION)
    if origin.licence != "unknown":
        writer.add_license(origin.licence.lower())
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    if "/" in origin.base:
        writer.add_base_model_organization(0, origin.base.split("/", 1)[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{origin.base}")
    writer.add_file_type(int(LlamaFileType[kinds[type]]))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string("edgedistill.recipe", origin.recipe)
    writer.add_string("edgedistill.source_digest", origin.adapter_digest)
    writer.add_string("edgedistill.base_sha256", origin.base_sha256)
    writer.add_uint32("edgedistill.lora_rank", int(config["r"]))


def _alpha(config: Mapping[str, Any]) -> float:
    """What llama.cpp divides by the rank."""
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(folder, f"peft_type is {config.get('peft_type')}, not LORA")
    for field, allowed in NEUTRAL.items():
        if config.get(field) not in allowed:
            _refuse(folder, f"{field} is {config[field]!r}, which llama.cpp's adapters cannot say")


def _refuse(where: Path, what: str) -> NoReturn:
    raise ArtifactError(
        what, where=str(where), hint="train plain LoRA, or merge the adapter and ship the model"
    )
