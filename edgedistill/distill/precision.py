"""fp32 or bf16: whichever trains this student faster on this machine, measured once."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from edgedistill import machine
from edgedistill.artifacts import Identity, Student, run_stage, tool_versions, write_json
from edgedistill.distill.model import lora_model, supervised_loss
from edgedistill.progress import Progress
from edgedistill.recipe import DistillSpec
from edgedistill.torch_runtime import device
from edgedistill.training.data import TrainingRow, collate
from edgedistill.training.loss import autocast

CPU_TOKENS = 256  # enough for a stable rate on a CPU, short where bf16 is emulated
GPU_TOKENS = 8192
TIMED = 2


def choose_precision(
    rows: Callable[[], Sequence[TrainingRow]],
    student: Student,
    spec: DistillSpec,
    pad_id: int,
    out: Path,
    progress: Progress,
) -> Literal["fp32", "bf16"]:
    """ "fp32" or "bf16"; stage "precision", told to `progress` when it is measured."""
    identity = Identity(
        stage="precision",
        version=1,
        spec={"rank": spec.lora.rank, "batch_size": spec.batch_size},
        inputs={"student": student.digest, "machine": machine.fingerprint()},
        tools=tool_versions("torch", "transformers", "peft"),
    )

    def work(folder: Path) -> dict[str, Any]:
        measured = _measure(rows(), student, spec, pad_id)
        gc.collect()  # its model must be gone before the one that is trained is loaded
        write_json(folder / "precision.json", measured)
        bf16 = measured["bf16"]
        progress.note(
            f"training in {measured['chosen']}: measured here fp32 {measured['fp32']:.0f} "
            f"tokens/s, bf16 {f'{bf16:.0f} tokens/s' if bf16 else measured['why_not_bf16']}"
        )
        return measured

    facts = run_stage(identity, out, progress, work).facts
    return "bf16" if facts["chosen"] == "bf16" else "fp32"


def _measure(
    rows: Sequence[TrainingRow], student: Student, spec: DistillSpec, pad_id: int
) -> dict[str, Any]:
    where = device()
    wanted = CPU_TOKENS if where.type == "cpu" else GPU_TOKENS
    some = _about(rows, wanted, spec.batch_size)
    batch = {name: tensor.to(where) for name, tensor in collate([some], pad_id).items()}
    model = lora_model(student, spec).to(where)
    tokens = sum(map(len, some))
    _step(model, batch, "fp32")
    fp32 = tokens / min(_step(model, batch, "fp32")[0] for _ in range(TIMED))
    bf16, why = _bf16(model, batch, tokens, tokens / fp32)
    chosen = "bf16" if bf16 > fp32 else "fp32"
    return {"fp32": fp32, "bf16": bf16, "chosen": chosen, "why_not_bf16": why, "tokens": tokens}


def _bf16(model: Any, batch: Any, tokens: int, fp32_seconds: float) -> tuple[float, str]:
    """Tokens/s, 0 where unusable with the reason. Where the CPU emulates bf16, its forward pass
    alone outlasts a whole fp32 step, and nothing more is timed."""
    forward, loss = _step(model, batch, "bf16", backward=False)
    if not math.isfinite(loss):
        return 0.0, "gives no finite loss"
    if forward > 2 * fp32_seconds:
        return 0.0, "is slower already in its forward pass"
    _step(model, batch, "bf16")
    return tokens / min(_step(model, batch, "bf16")[0] for _ in range(TIMED)), ""


def _step(model: Any, batch: Any, precision: str, backward: bool = True) -> tuple[float, float]:
    """Seconds and loss of one step."""
    import torch

    where = next(model.parameters()).device
    started = time.perf_counter()
    with autocast(where, precision):
        loss = supervised_loss(model, batch)
    if backward:
        loss.backward()
    value = float(loss.detach())
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started, value


def _about(rows: Sequence[TrainingRow], tokens: int, most: int) -> list[TrainingRow]:
    """Rows of middling length, about `tokens` tokens of them, at most `most`."""
    middle = sorted(rows, key=len)[len(rows) // 2 :] or list(rows)
    count = max(1, min(most, tokens // len(middle[0])))
    return middle[:count]
