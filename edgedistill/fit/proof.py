"""The quantized file of a fitted student holds, bit for bit, what the student was trained on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Identity, Quantized, Variant, run_stage, tool_versions
from edgedistill.errors import GateFailed
from edgedistill.progress import Progress

NAMED = 3


def prove(variant: Variant, quantized: Quantized, out: Path, progress: Progress) -> None:
    """Stage "prove".

    Raises:
        GateFailed: step "quantize": names the tensors that the runtime's quantizer made otherwise.
    """
    identity = Identity(
        stage="prove",
        version=1,
        spec={},
        inputs={
            "checkpoint": variant.checkpoint.digest,
            "allocation": variant.allocation.digest,
            "quantized": quantized.digest,
        },
        tools=tool_versions("llama-cpp-python", "onnx", "torch"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        different, count = _different(variant, quantized.model, progress)
        if different:
            raise GateFailed(
                "quantize",
                f"{len(different)} of {count} matrices in the file are not what was fitted: "
                + ", ".join(different[:NAMED]),
                where=str(quantized.model),
                hint="the runtime's quantizer does not do what this version of edgedistill knows "
                f"(on {platform.machine()}); install the pinned versions (constraints.txt) and "
                "build again",
            )
        return {"matrices": count}

    run_stage(identity, out, progress, work)


def _different(variant: Variant, file: Path, progress: Progress) -> tuple[list[str], int]:
    import numpy as np
    import torch

    from edgedistill.fit.formats import quantize_dequantize
    from edgedistill.importance import read_importance
    from edgedistill.quantized_values import read_matrices
    from edgedistill.tensors import read_layout

    given = variant.allocation.importance
    importance = None if given is None else read_importance(given)
    types = variant.allocation.types
    layout = read_layout(variant.checkpoint.folder, "F32")
    fitted = [tensor for tensor in layout.tensors if tensor.name in types]
    held = read_matrices(file, layout)
    different = []
    with progress.task("compare with what was fitted", len(fitted), "matrices") as task:
        for tensor in fitted:
            rows = tensor.in_checkpoint_order(np.concatenate(list(tensor.blocks())))
            column = None
            if importance is not None and tensor.name in importance.sums:
                column = torch.from_numpy(importance.mean(tensor.name))
            wanted = quantize_dequantize(torch.from_numpy(rows), types[tensor.name], column)
            if not torch.equal(wanted, torch.from_numpy(held[tensor.name]())):
                different.append(tensor.name)
            task.advance()
    return different, len(fitted)
