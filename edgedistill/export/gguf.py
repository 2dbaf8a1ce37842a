"""Write a checkpoint as a GGUF file, tensor by tensor, with the base's own tokenizer keys."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from edgedistill.ahead import ahead
from edgedistill.errors import MissingTool
from edgedistill.families import exact_context
from edgedistill.gguf_tokenizer import STRIPS, strips_after_special
from edgedistill.hyperparameters import hyperparameters
from edgedistill.names import name_parts
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER_CONFIG
from edgedistill.tensors import Encoding, Layout, read_layout

VERSION = "v1.0"


@dataclass(frozen=True)
class Provenance:
    """What the file says about where it comes from. `base`: "org/name" on the model hub, or a
    name; `licence`: SPDX; `source_digest`: of the checkpoint."""

    recipe: str
    base: str
    licence: str
    source_digest: str


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds; `architecture` is llama.cpp's name."""

    architecture: str
    tensors: int
    parameters: int


def write_gguf(
    checkpoint: Path,
    tokenizer: Path,
    destination: Path,
    made_from: Provenance,
    progress: Progress,
    encoding: Encoding = "F16",
) -> Layout:
    """Export the checkpoint folder to `destination`; `tokenizer` is a `tokenizer.gguf.json`.

    1-D tensors and norms stay f32, matrices become `encoding`, a tied head is not written. The
    tensors are bit-identical to those of llama.cpp's convert_hf_to_gguf.py --outtype f16 or f32.

    Raises:
        ArtifactError: something in the checkpoint that cannot be exported (see tensors.py).
    """
    made = writer_class()
    layout = read_layout(checkpoint, encoding)
    _note_context(layout, progress)
    writer = made(path=None, arch=layout.architecture)
    _add_general(writer, layout.parameters, made_from, _strips(tokenizer))
    _add_hyperparameters(writer, layout, encoding)
    _add_tokenizer(writer, tokenizer)
    for tensor in layout.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.bytes)
    try:
        writer.write_header_to_file(destination)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, layout, progress)
    finally:
        writer.close()
    return layout


def rewrite_gguf(
    source: Path, tokenizer: Path, destination: Path, made_from: Provenance, progress: Progress
) -> Written:
    """A copy of what llama.cpp's converter wrote, with the base's tokenizer keys and our own
    `general` keys; hyperparameters and tensors as they are."""
    from gguf import GGUFReader, GGUFValueType

    made, reader = writer_class(), GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    writer = made(path=None, arch=architecture)
    _add_general(writer, parameters, made_from, _strips(tokenizer))
    for name, field in reader.fields.items():
        if name.startswith(f"{architecture}.") or name == "general.file_type":
            element = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    _add_tokenizer(writer, tokenizer)
    for tensor in reader.tensors:
        data = tensor.data
        writer.add_tensor_info(
            tensor.name, data.shape, data.dtype, data.nbytes, raw_dtype=tensor.tensor_type
        )
    try:
        writer.write_header_to_file(destination)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _copy_tensors(writer, reader.tensors, progress)
    finally:
        writer.close()
    return Written(architecture, len(reader.tensors), parameters)


def _copy_tensors(writer: Any, tensors: Any, progress: Progress) -> None:
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    total = sum(tensor.data.nbytes for tensor in tensors)
    with progress.task("export", total / 1e6, "MB") as task:
        for tensor in tensors:
            stream.write(tensor.data.data)
            writer.write_padding(stream, tensor.data.nbytes)
            task.advance(tensor.data.nbytes / 1e6)


def _note_context(layout: Layout, progress: Progress) -> None:
    tokens, why = exact_context(layout.family, layout.config)
    if why is not None:
        own = layout.config["max_position_embeddings"]
        progress.note(f"the exported context is {tokens} tokens, not {own}: {why}")


def writer_class() -> Any:
    """`gguf.GGUFWriter`, or MissingTool."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingTool(
            "the package gguf is not installed", hint='in the checkout: pip install -e ".[build]"'
        ) from error
    return GGUFWriter


def _write_tensors(writer: Any, layout: Layout, progress: Progress) -> None:
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    total = sum(tensor.bytes for tensor in layout.tensors)
    with progress.task("export", total / 1e6, "MB") as task:
        # The writer's own write_tensor_data wants a whole tensor in memory; here it is two blocks,
        # one that is written and the next one, which is converted meanwhile.
        pairs = ahead((tensor, block) for tensor in layout.tensors for block in tensor.blocks())
        for _, blocks in groupby(pairs, lambda pair: pair[0].name):
            for _, block in blocks:
                stream.write(block.reshape(-1))
                task.advance(block.nbytes / 1e6)
            writer.write_padding(stream, stream.tell())


def _strips(tokenizer: Path) -> bool:
    config = tokenizer.with_name(TOKENIZER_CONFIG)
    return bool(json.loads(config.read_text("utf-8")).get(STRIPS, False))


def _display_name(name: str, strips: bool) -> str:
    """`name`, such that llama.cpp's tokenizer behaves as the base's: it looks for Phi-3 in it."""
    if strips:
        return name if strips_after_special(name) else f"{name} (Phi-3)"
    return re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)


def _add_general(writer: Any, parameters: int, made_from: Provenance, strips: bool) -> None:
    from gguf import GGML_QUANT_VERSION

    parts = name_parts(made_from.base, parameters)
    base = made_from.base.rsplit("/", 1)[-1]
    writer.add_type("model")
    writer.add_name(_display_name(f"{base} {made_from.recipe}", strips))
    writer.add_basename(parts.base)
    writer.add_size_label(parts.size_label)
    writer.add_finetune("-".join(word for word in (parts.finetune, made_from.recipe) if word))
    writer.add_version(VERSION)
    writer.add_license(made_from.licence.lower())
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    if "/" in made_from.base:
        writer.add_base_model_organization(0, made_from.base.split("/", 1)[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{made_from.base}")
    writer.add_string("edgedistill.recipe", made_from.recipe)
    writer.add_string("edgedistill.source_digest", made_from.source_digest)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_hyperparameters(writer: Any, layout: Layout, encoding: Encoding) -> None:
    from gguf import LlamaFileType

    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in hyperparameters(layout).items():
        add[type(value)](f"{layout.architecture}.{name}", value)
    kinds = {"F16": LlamaFileType.MOSTLY_F16, "F32": LlamaFileType.ALL_F32}
    writer.add_file_type(int(kinds[encoding]))


def _add_tokenizer(writer: Any, file: Path) -> None:
    from gguf import GGUFValueType

    for entry in json.loads(file.read_text("utf-8")):
        if entry["value"] == []:
            continue  # GGUF has no empty arrays
        element = None if entry["element"] is None else GGUFValueType[entry["element"]]
        kind = GGUFValueType[entry["type"]]
        writer.add_key_value(entry["key"], entry["value"], kind, element)
