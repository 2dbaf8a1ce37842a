"""Export: a merged checkpoint in the device runtime's own format, before quantization."""

from __future__ import annotations

import shutil
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
from edgedistill.export.gguf import VERSION, Provenance, write_gguf
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

    Raises:
        ArtifactError: the checkpoint cannot be exported. StorageError: the disk is full.
    """
    identity = Identity(
        stage="export",
        version=1,
        spec={
            "name": name,
            "encoding": encoding,
            "base": student.name,
            "licence": student.licence,
            "version": VERSION,
        },
        inputs={"checkpoint": checkpoint.digest, "student": student.digest},
        tools=tool_versions("gguf"),
    )

    def work(folder: Path) -> dict[str, Any]:
        made_from = Provenance(name, student.name, student.licence, checkpoint.digest)
        temporary = folder / "model.gguf"
        layout = write_gguf(
            checkpoint.folder,
            checkpoint.folder / TOKENIZER_GGUF,
            temporary,
            made_from,
            progress,
            encoding,
        )
        model = folder / gguf_name(student.name, layout.parameters, name, VERSION, encoding)
        temporary.rename(model)
        for file in TOKENIZER_FILES:  # whoever runs the file needs the prompt it was trained with
            shutil.copyfile(checkpoint.folder / file, folder / file)
        if (checkpoint.folder / KEPT_TOKENS).is_file():
            shutil.copyfile(checkpoint.folder / KEPT_TOKENS, folder / KEPT_TOKENS)
        return {
            "file": model.name,
            "architecture": layout.architecture,
            "tensors": len(layout.tensors),
            "parameters": layout.parameters,
        }

    done = run_stage(identity, out, progress, work)
    return Exported(done.folder, done.digest, done.folder / done.facts["file"])
