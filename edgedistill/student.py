"""The base student: a pinned GGUF turned into an fp32 Hugging Face checkpoint that trains.

`tokenizer.gguf.json` keeps every `tokenizer.*` key of the GGUF for the export to write back
unchanged; `tokenizer.json` is built from the same keys, because the tokenizer that transformers
reads from a GGUF is not the model's.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.artifacts import (
    RESUME,
    Identity,
    Student,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.converter import HINT, checkout
from edgedistill.errors import ArtifactError, WeightsError
from edgedistill.families import ARCHITECTURES, is_own, known_names
from edgedistill.gguf_header import read_header
from edgedistill.gguf_student import check_student, complete_config
from edgedistill.gguf_tokenizer import NAME, build_tokenizer, tokenizer_config
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.weights import ModelFile, describe, locate

TOKENIZER_GGUF = "tokenizer.gguf.json"
KEPT_TOKENS = "kept-tokens.json"  # of a trimmed checkpoint: the IDs its tokens had before
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_GGUF)

# The writer has an alignment of its own.
NOT_COPIED = ("GGUF.", "tokenizer.", "general.architecture", "general.alignment")


@dataclass(frozen=True)
class Key:
    """One GGUF key: `type` and `element` (of an array) are names of gguf.GGUFValueType."""

    key: str
    type: str
    element: str | None
    value: Any


def prepare_student(spec: StudentSpec, out: Path, progress: Progress) -> Student:
    """Stage "student": the GGUF of `spec.weights` as an fp32 checkpoint folder with its tokenizer.

    Raises:
        WeightsError: the file cannot be had, its architecture or pre-tokenizer is not known, or
            its chat template cannot prompt a student.
    """
    about = describe(spec.weights)
    identity = Identity(
        stage="student",
        version=1,
        spec={"dtype": "float32"},
        inputs={"weights": about.sha256},
        tools=tool_versions("transformers", "tokenizers", "gguf"),
    )

    def work(folder: Path) -> dict[str, Any]:
        file = locate(spec.weights, progress)
        try:
            read_header(file.path)  # says what is wrong and where
            return _make(folder, file, spec, progress)
        except WeightsError as error:  # of the folder that was to become the student
            raise WeightsError(error.what, where=str(file.path), hint=error.hint) from error
        except ArtifactError as error:
            _refuse(file.path, error.what, error)
        # A damaged key turns up where it is used; chained, so that a fault of ours is found.
        except (KeyError, IndexError, ValueError, TypeError) as error:
            told = f"what it says of its tokenizer or layers cannot be used: {error!r}"
            _refuse(file.path, told, error)

    done = run_stage(identity, out, progress, work)
    return Student(
        folder=done.folder,
        digest=done.digest,
        name=about.base_model or about.name,
        licence=about.licence,
        source=f"{about.name} sha256:{about.sha256}",
    )


def _make(folder: Path, file: ModelFile, spec: StudentSpec, progress: Progress) -> dict[str, Any]:
    reader = _opened(file.path)
    keys = tokenizer_keys(reader)
    name = reader.fields.get(NAME)
    write_tokenizer(folder, keys, name.contents() if name else "")
    StudentPrompt(folder, StudentSpec(weights=spec.weights))
    weights = folder / RESUME / "weights.gguf"
    write_without_tokenizer(reader, weights)
    made = _convert(weights, file.path, folder, keys, _architecture(reader))
    if is_own(folder):
        complete_config(reader, folder)
        check_student(reader, folder, file.path)
    else:
        progress.note(
            f"{_architecture(reader)} is read by transformers and not compared with the file: "
            f"this family is not among {known_names()}"
        )
    return {**made, "weights": file.name, "licence": file.licence}


def read_tokenizer_keys(path: Path) -> list[Key]:
    """Every `tokenizer.*` key of a GGUF file, in file order.

    Raises:
        WeightsError: not a GGUF file, or an architecture outside the known families.
    """
    return tokenizer_keys(_opened(path))


def _opened(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = _architecture(reader)
    except (ValueError, OSError, IndexError, KeyError) as error:
        _refuse(path, f"not a readable GGUF file: {error}", error)
    if architecture not in ARCHITECTURES:
        what = f"architecture {architecture!r} cannot be trained, only {known_names()}"
        if checkout() is None:
            raise WeightsError(what, where=str(path), hint=f"choose another student; or {HINT}")
    return reader


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


def tokenizer_keys(reader: Any) -> list[Key]:
    """The `tokenizer.*` keys of a `gguf.GGUFReader`."""
    return [_key(name, field) for name, field in reader.fields.items() if _of_tokenizer(name)]


def _key(name: str, field: Any) -> Key:
    types = [kind.name for kind in field.types]
    return Key(name, types[0], types[1] if len(types) > 1 else None, field.contents())


def _of_tokenizer(name: str) -> bool:
    return name.startswith("tokenizer.")


def write_without_tokenizer(reader: Any, into: Path) -> None:
    """A copy of a GGUF file without its tokenizer.

    transformers parses the file three times over, and nearly all of that is a loop in Python over
    the tokenizer's hundred thousand strings.
    """
    from gguf import GGUFValueType, GGUFWriter

    architecture, size = _architecture(reader), len(reader.fields["tokenizer.ggml.tokens"].data)
    into.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(into, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(NOT_COPIED):
            key = _key(name, field)
            element = None if key.element is None else GGUFValueType[key.element]
            writer.add_key_value(name, key.value, GGUFValueType[key.type], element)
    if f"{architecture}.vocab_size" not in reader.fields:
        writer.add_vocab_size(size)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(folder: Path, keys: list[Key], name: str = "") -> None:
    """Write `tokenizer.gguf.json`, `tokenizer.json` and `tokenizer_config.json` into `folder`;
    `name` is the GGUF's `general.name`, which llama.cpp's tokenizer looks at.

    Raises:
        WeightsError: a tokenizer that cannot be built exactly, see gguf_tokenizer.py.
    """
    values = {key.key: key.value for key in keys} | {NAME: name}
    write_json(folder / TOKENIZER_GGUF, [asdict(key) for key in keys])
    build_tokenizer(values, folder).save(str(folder / TOKENIZER))
    write_json(folder / TOKENIZER_CONFIG, tokenizer_config(values))


def _convert(
    weights: Path, source: Path, folder: Path, keys: list[Key], architecture: str
) -> dict[str, Any]:
    # Its GGUF reader draws a bar whatever its own logging is told; tqdm reads this when imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    values = {key.key: key.value for key in keys}
    bos = values.get("tokenizer.ggml.bos_token_id")
    eos = values["tokenizer.ggml.eos_token_id"]
    pad = values.get("tokenizer.ggml.padding_token_id", eos)
    # Phi-3's own default is beyond a smaller vocabulary.
    own = {"pad_token_id": pad} if architecture == "phi3" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(weights.parent),
            gguf_file=weights.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            **own,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        _refuse(source, f"transformers cannot read it: {error}", error)
    model.config.bos_token_id, model.config.eos_token_id = bos, eos
    model.config.pad_token_id = pad
    # Nothing but token IDs: a sampling or repetition penalty left here would change evaluation.
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "tokens": len(values["tokenizer.ggml.tokens"])}


def _refuse(where: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(what, where=str(where), hint="choose another student.weights") from cause
