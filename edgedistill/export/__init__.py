"""Export: a merged checkpoint in the device runtime's own format, before quantization."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Checkpoint,
    Exported,
    Identity,
    Student,
    run_stage,
    tool_versions,
)
from edgedistill.converter import CONVERTER, HINT, checkout, convert, converter_digest
from edgedistill.errors import ArtifactError
from edgedistill.export.gguf import VERSION, Provenance, Written, rewrite_gguf, write_gguf
from edgedistill.families import is_own, known_names
from edgedistill.names import gguf_name
from edgedistill.progress import Progress
from edgedistill.student import KEPT_TOKENS, TOKENIZER_FILES, TOKENIZER_GGUF
from edgedistill.tensors import Encoding


def export(
    checkpoint: Checkpoint,
    student: Student,
    name: str,
    out: Path,
    progress: Progress,
    encoding: Encoding = "F16",
) -> Exported:
    """Stage "export": GGUF from `checkpoint`, with the tokenizer keys of the GGUF it came from.

    `name` is the recipe's; `encoding` is of the matrices. A fitted checkpoint takes F32: f16 would
    round its weights before they are quantized. Whether the file behaves like the checkpoint is
    `verify`'s question.

    Another architecture than those of families.py goes through llama.cpp's converter where the
    user has one; the facts' `path` says which way was taken.

    Raises:
        ArtifactError: the checkpoint cannot be exported. StorageError: the disk is full.
    """
    path, converter = _path(checkpoint.folder)
    identity = Identity(
        stage="export",
        version=1,
        spec={
            "name": name,
            "encoding": encoding,
            "base": student.stem,
            "licence": student.licence,
            "version": VERSION,
            **({} if converter is None else {"converter": path}),
        },
        inputs={"checkpoint": checkpoint.digest, "student": student.digest},
        tools=tool_versions("gguf"),
    )

    def work(folder: Path) -> dict[str, Any]:
        made_from = Provenance(name, student.name, student.licence, checkpoint.digest)
        temporary = folder / "model.gguf"
        tokenizer = checkpoint.folder / TOKENIZER_GGUF
        write = _own if converter is None else partial(_converted, converter)
        made = write(checkpoint.folder, tokenizer, temporary, made_from, encoding, progress)
        model = folder / gguf_name(student.stem, made.parameters, name, VERSION, encoding)
        temporary.rename(model)
        for file in TOKENIZER_FILES:  # whoever runs the file needs the prompt it was trained with
            shutil.copyfile(checkpoint.folder / file, folder / file)
        if (checkpoint.folder / KEPT_TOKENS).is_file():
            shutil.copyfile(checkpoint.folder / KEPT_TOKENS, folder / KEPT_TOKENS)
        return {
            "file": model.name,
            "architecture": made.architecture,
            "tensors": made.tensors,
            "parameters": made.parameters,
            "path": path,
        }

    done = run_stage(identity, out, progress, work)
    return Exported(done.folder, done.digest, done.folder / done.facts["file"])


def _path(checkpoint: Path) -> tuple[str, Path | None]:
    """Which way a checkpoint is exported, and the converter's folder if it is that way."""
    if is_own(checkpoint):
        return "edgedistill", None
    folder = checkout()
    if folder is None:
        raise ArtifactError(
            f"this architecture cannot be exported to GGUF, only {known_names()}",
            where=str(checkpoint),
            hint=HINT,
        )
    return f"{CONVERTER} {converter_digest(folder)}", folder


def _own(
    checkpoint: Path,
    tokenizer: Path,
    destination: Path,
    made_from: Provenance,
    encoding: Encoding,
    progress: Progress,
) -> Written:
    layout = write_gguf(checkpoint, tokenizer, destination, made_from, progress, encoding)
    return Written(layout.architecture, len(layout.tensors), layout.parameters)


def _converted(
    converter: Path,
    checkpoint: Path,
    tokenizer: Path,
    destination: Path,
    made_from: Provenance,
    encoding: Encoding,
    progress: Progress,
) -> Written:
    progress.note(f"the export goes through llama.cpp's converter ({converter})")
    bare = destination.with_name("converted.gguf")
    try:
        convert(converter, checkpoint, bare, encoding)
        return rewrite_gguf(bare, tokenizer, destination, made_from, progress)
    finally:
        bare.unlink(missing_ok=True)
