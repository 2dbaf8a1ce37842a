"""The base student: a GGUF file or a Hugging Face model turned into an fp32 checkpoint that trains.

`tokenizer.gguf.json` keeps every `tokenizer.*` key for the export to write: those of the GGUF
unchanged, those of a Hugging Face model as hf_tokenizer.py proves them. `tokenizer.json` is built
from the same keys, so that training cuts text as the device will.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.artifacts import (
    RESUME,
    Identity,
    Student,
    TokenMixEntry,
    digest_of,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.converter import HINT, checkout
from edgedistill.errors import ArtifactError, WeightsError
from edgedistill.families import ARCHITECTURES, is_own, known_names
from edgedistill.gguf_header import read_header
from edgedistill.gguf_student import check_student, complete_config
from edgedistill.gguf_tokenizer import NAME, Key, build_tokenizer, tokenizer_config
from edgedistill.hf_config import require_family, require_student
from edgedistill.hf_student import convert_folder, embedding_rows
from edgedistill.hf_tokenizer import first_difference, tokenizer_keys_of
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.weights import (
    ModelFile,
    ModelFolder,
    describe,
    licence_of,
    locate,
    model_folder,
)

TOKENIZER_GGUF = "tokenizer.gguf.json"
KEPT_TOKENS = "kept-tokens.json"  # of a trimmed checkpoint: the IDs its tokens had before
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_GGUF)

# The writer has an alignment of its own.
NOT_COPIED = ("GGUF.", "tokenizer.", "general.architecture", "general.alignment")


def prepare_student(
    spec: StudentSpec, out: Path, progress: Progress, asked: Sequence[TokenMixEntry] = ()
) -> Student:
    """Stage "student": the model of `spec.weights` as an fp32 checkpoint folder with its tokenizer.
    `asked` are prompts on which the tokens of a Hugging Face model are compared once more.

    Raises:
        WeightsError: it cannot be had, its architecture or tokenizer is not known, or its chat
            template cannot prompt a student.
    """
    model = model_folder(spec.weights)
    if model is not None:
        student = _from_folder(model, spec, out, progress)
        return _proven(model, student, spec, asked, out, progress) if asked else student
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
        with _told_of(file.path, folder):
            read_header(file.path)  # says what is wrong and where
            return _make(folder, file, spec, progress)

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


@contextmanager
def _told_of(source: Path, folder: Path) -> Iterator[None]:
    """What is wrong with the `folder` that was to become the student is wrong with its source."""
    try:
        yield
    except WeightsError as error:
        own = error.where is None or Path(error.where).is_relative_to(folder)
        where = str(source) if own else error.where
        raise WeightsError(error.what, where=where, hint=error.hint) from error
    except ArtifactError as error:
        _refuse(source, error.what, error)
    # A damaged value turns up where it is used; chained, so that a fault of ours is found.
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        told = f"what it says of its tokenizer or layers cannot be used: {error!r}"
        _refuse(source, told, error)


def _from_folder(model: ModelFolder, spec: StudentSpec, out: Path, progress: Progress) -> Student:
    identity = Identity(
        stage="student",
        version=1,
        spec={"dtype": "float32", "kind": "folder"},
        inputs={"weights": model.identity},
        tools=tool_versions("transformers", "tokenizers"),
    )

    def work(folder: Path) -> dict[str, Any]:
        source = model.obtain(progress, _accept)
        with _told_of(source, folder):
            made = _make_of_folder(source, folder, spec, progress)
        return {**made, "weights": model.name, "licence": licence_of(source)}

    done = run_stage(identity, out, progress, work)
    return Student(done.folder, done.digest, model.name, done.facts["licence"], model.source)


def _make_of_folder(
    source: Path, folder: Path, spec: StudentSpec, progress: Progress
) -> dict[str, Any]:
    require_student(source)
    keys, name, told = tokenizer_keys_of(source, embedding_rows(source))
    write_tokenizer(folder, keys, name)
    StudentPrompt(folder, StudentSpec(weights=spec.weights))
    values = {key.key: key.value for key in keys}
    parameters = convert_folder(source, folder, _ids(values))
    for text in told:
        progress.note(text)
    if not is_own(folder):
        progress.note(
            "this family is read by transformers, and exported by llama.cpp's converter: it is "
            f"not among {known_names()}"
        )
    return {
        "parameters": parameters,
        "tokens": len(values["tokenizer.ggml.tokens"]),
        "pre_tokenizer": values["tokenizer.ggml.pre"],
    }


def _accept(config: Path) -> None:
    """Refuse another family before its weights are fetched."""
    require_family(json.loads(config.read_text("utf-8")), config)


def _proven(
    model: ModelFolder,
    student: Student,
    spec: StudentSpec,
    asked: Sequence[TokenMixEntry],
    out: Path,
    progress: Progress,
) -> Student:
    """Stage "tokens": the prompts of the token mix have the IDs of the model's tokenizer.json."""
    prompts = [[entry.id, [dict(message) for message in entry.messages]] for entry in asked]
    identity = Identity(
        stage="tokens",
        version=1,
        spec={"prompt": spec.model_dump(mode="json", include={"system", "prompt"})},
        inputs={"student": student.digest, "weights": model.identity, "asked": digest_of(prompts)},
        tools=tool_versions("tokenizers"),
    )

    def work(folder: Path) -> dict[str, Any]:
        shown = StudentPrompt(student.folder, spec)

        def texts() -> Iterator[tuple[str, str]]:
            for entry in asked:
                yield entry.id, shown.render(entry.prompt, entry.messages[:-1])

        source = model.obtain(progress, _accept)
        different = first_difference(source, student.folder, texts())
        if different is not None:
            _refuse(
                source / TOKENIZER,
                f"llama.cpp would cut the prompt {different[0]} otherwise than this tokenizer: "
                f"{different[1]!r}",
            )
        return {"prompts": len(asked)}

    run_stage(identity, out, progress, work)
    return student


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
    bos, eos, pad = _ids(values).values()
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


def _ids(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of special tokens."""
    eos = values["tokenizer.ggml.eos_token_id"]
    return {
        "bos": values.get("tokenizer.ggml.bos_token_id"),
        "eos": eos,
        "pad": values.get("tokenizer.ggml.padding_token_id", eos),
    }


def _refuse(where: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(what, where=str(where), hint="choose another student.weights") from cause
