"""Merge: the adapter added into the base student's weights, in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Adapter, Checkpoint, Identity, Student, run_stage, tool_versions
from edgedistill.errors import ArtifactError
from edgedistill.progress import Progress
from edgedistill.student import TOKENIZER_FILES
from edgedistill.torch_runtime import WHOLE, load_model

FP32 = "F32"  # safetensors' name
CONFIGS = ("config.json", "generation_config.json")


def merge(adapter: Adapter, student: Student, out: Path, progress: Progress) -> Checkpoint:
    """Stage "merge": W + alpha / rank * B A for every adapted layer (DoRA's magnitudes, too); what
    was trained whole is taken as it is. The tokenizer is the base's, byte for byte.

    Raises:
        ArtifactError: the base is quantized or not in fp32: merging there would round the adapter.
    """
    identity = Identity(
        stage="merge",
        version=1,
        spec={"dtype": "float32"},
        inputs={"adapter": adapter.digest, "student": student.digest},
        tools=tool_versions("torch", "transformers", "peft", "safetensors"),
    )

    def work(folder: Path) -> dict[str, Any]:
        require_fp32(student.folder)
        return _merge(adapter.folder, student.folder, folder)

    done = run_stage(identity, out, progress, work)
    return Checkpoint(folder=done.folder, digest=done.digest)


def require_fp32(folder: Path) -> None:
    """Refuse a checkpoint folder that is quantized or holds any tensor that is not fp32.

    Raises:
        ArtifactError: it is; names the first such tensor.
    """
    from safetensors import safe_open

    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise _refused(folder, "it is quantized")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                kind = tensors.get_slice(name).get_dtype()
                if kind != FP32:
                    raise _refused(folder, f"{name} is {kind}")


def _refused(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"an adapter is merged into fp32 weights only, and {why}",
        where=str(folder),
        hint="delete this folder; the next build makes the student again, in fp32",
    )


def _merge(adapter: Path, base: Path, folder: Path) -> dict[str, Any]:
    from peft import PeftModel

    if (adapter / WHOLE).is_file():  # every weight was trained: it is the checkpoint
        for name in (WHOLE, *CONFIGS):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        _copy_tokenizer(base, folder)
        return {"merged_layers": 0, "trained_whole": True}
    adapted = PeftModel.from_pretrained(load_model(base), str(adapter), local_files_only=True)
    layers = sum(1 for name, _ in adapted.named_parameters() if "lora_A" in name)
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    _copy_tokenizer(base, folder)
    return {"merged_layers": layers}


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copyfile(base / name, folder / name)
