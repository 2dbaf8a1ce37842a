"""Export for onnxruntime-genai: the checkpoint as an ONNX fp32 model folder, by its builder."""

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
from edgedistill.export.gguf import VERSION
from edgedistill.families import even_context
from edgedistill.names import onnx_name
from edgedistill.onnx_builder import build_onnx, refuse_unknown
from edgedistill.onnx_formats import UNQUANTIZED
from edgedistill.progress import Progress
from edgedistill.runtimes import ONNX
from edgedistill.student import TOKENIZER_FILES
from edgedistill.tensors import read_layout

TOOLS = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers", "torch")


def export_onnx(
    checkpoint: Checkpoint, student: Student, name: str, out: Path, progress: Progress
) -> Exported:
    """Stage "export" for targets that run onnxruntime-genai: model.onnx in fp32, genai_config.json,
    the student's own tokenizer and chat template.

    `name` is the recipe's. Whether it behaves like the checkpoint is `verify_onnx`'s question.

    Raises:
        ArtifactError: an architecture that cannot be exported. MissingTool: no builder.
        RuntimeFailure: the builder refused or died. StorageError: the disk is full.
    """
    identity = Identity(
        stage="export",
        version=2,
        spec={
            "runtime": ONNX,
            "name": name,
            "encoding": UNQUANTIZED,
            "base": student.stem,
            "version": VERSION,
        },
        inputs={"checkpoint": checkpoint.digest, "student": student.digest},
        tools=tool_versions(*TOOLS),
    )

    def work(folder: Path) -> dict[str, Any]:
        refuse_unknown(checkpoint.folder)
        layout = read_layout(checkpoint.folder)
        tokens, why = even_context(layout.config)
        if why is not None:
            progress.note(f"the exported context is {tokens} tokens: {why}")
        model = folder / onnx_name(student.stem, layout.parameters, name, VERSION, UNQUANTIZED)
        with progress.task("export to ONNX", None):
            build_onnx(checkpoint.folder, model, UNQUANTIZED)
        for file in TOKENIZER_FILES:  # whoever runs the model needs the prompt it was trained with
            shutil.copyfile(student.folder / file, folder / file)
        return {
            "file": model.name,
            "architecture": layout.architecture,
            "tensors": len(layout.tensors),
            "parameters": layout.parameters,
        }

    done = run_stage(identity, out, progress, work)
    return Exported(done.folder, done.digest, done.folder / done.facts["file"], checkpoint.folder)
