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
from edgedistill.distill.model import trained_model
from edgedistill.errors import TrainingError
from edgedistill.methods import DistillSpec
from edgedistill.progress import Progress
from edgedistill.torch_runtime import device
from edgedistill.training.data import PART_TOKENS, TrainingRow
from edgedistill.training.learner import Learner, Packer, backward, nll_loss
from edgedistill.training.loss import autocast
from edgedistill.training.need import fit_here
from edgedistill.training.packing import moved, packed_attention

CPU_TOKENS = 256  # enough for a stable rate on a CPU, short where bf16 is emulated
GPU_TOKENS = 8192
TIMED = 2


def choose_precision(
    rows: Callable[[], Sequence[TrainingRow]],
    student: Student,
    spec: DistillSpec,
    out: Path,
    progress: Progress,
) -> Literal["fp32", "bf16"]:
    """ "fp32" or "bf16"; stage "precision", told to `progress` when it is measured."""
    identity = Identity(
        stage="precision",
        version=3,
        spec={
            "tuning": spec.tuning,
            "rank": None if spec.tuning == "full" else spec.lora.rank,
            "batch_size": spec.batch_size,
        },
        inputs={"student": student.digest, "machine": machine.fingerprint()},
        tools=tool_versions("torch", "transformers", "peft"),
    )

    def work(folder: Path) -> dict[str, Any]:
        measured = _measure(rows(), student, spec)
        _forget()  # its model must be gone before the one that is trained is loaded
        write_json(folder / "precision.json", measured)
        fp32, bf16 = (
            f"{measured[kind]:.0f} tokens/s" if measured[kind] else measured[f"why_not_{kind}"]
            for kind in ("fp32", "bf16")
        )
        chosen = measured["chosen"]
        progress.note(f"training in {chosen}: measured here fp32 {fp32}, bf16 {bf16}")
        return measured

    facts = run_stage(identity, out, progress, work).facts
    return "bf16" if facts["chosen"] == "bf16" else "fp32"


def _measure(rows: Sequence[TrainingRow], student: Student, spec: DistillSpec) -> dict[str, Any]:
    where = device()
    wanted = CPU_TOKENS if where.type == "cpu" else GPU_TOKENS
    some = _about(rows, wanted, spec.batch_size)
    tokens, batch = sum(map(len, some)), moved(Packer(PART_TOKENS[where.type])([some]), where)

    def learner(precision: Literal["fp32", "bf16"]) -> Learner:
        own = spec.model_copy(update={"precision": precision})
        made: Learner = Learner(trained_model(student.folder, own), nll_loss).to(where)
        return made

    found: dict[str, Any] = {"tokens": tokens, "why_not_fp32": "", "why_not_bf16": ""}
    if not _fits(student.folder, spec, rows, where.type):
        why = "needs more memory than is free"
        return {**found, "fp32": 0.0, "bf16": 0.0, "chosen": "bf16", "why_not_fp32": why}
    model = learner("fp32")
    _step(model, batch, "fp32")
    fp32 = tokens / min(_step(model, batch, "fp32")[0] for _ in range(TIMED))
    del model
    _forget()
    bf16, why = _bf16(learner("bf16"), batch, tokens, tokens / fp32)
    chosen = "bf16" if bf16 > fp32 else "fp32"
    return {**found, "fp32": fp32, "bf16": bf16, "chosen": chosen, "why_not_bf16": why}


def _fits(folder: Path, spec: DistillSpec, rows: Sequence[TrainingRow], kind: str) -> bool:
    """Whether memory suffices in fp32.

    Raises:
        TrainingError: it does not in bf16 either.
    """
    fit_here(folder, spec.model_copy(update={"precision": "bf16"}), rows, kind)
    try:
        fit_here(folder, spec.model_copy(update={"precision": "fp32"}), rows, kind)
    except TrainingError:
        return False
    return True


def _forget() -> None:
    """Give back what a model took that is gone, on a GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bf16(model: Learner, batch: Any, tokens: int, fp32_seconds: float) -> tuple[float, str]:
    """Tokens/s, 0 where unusable with the reason. Where the CPU emulates bf16, its forward pass
    alone outlasts a whole fp32 step, and nothing more is timed."""
    forward, loss = _forward(model, batch)
    if not math.isfinite(loss):
        return 0.0, "gives no finite loss"
    if forward > 2 * fp32_seconds:
        return 0.0, "is slower already in its forward pass"
    _step(model, batch, "bf16")
    return tokens / min(_step(model, batch, "bf16")[0] for _ in range(TIMED)), ""


def _forward(model: Learner, batch: Any) -> tuple[float, float]:
    """Seconds and loss of a forward pass in bf16."""
    import torch

    started, where = time.perf_counter(), next(model.parameters()).device
    with torch.no_grad(), packed_attention(model.plain), autocast(where, "bf16"):
        loss = sum(float(model(part)) for part in batch["parts"]) / batch["total"]
    return time.perf_counter() - started, loss


def _step(model: Learner, batch: Any, precision: str) -> tuple[float, float]:
    """Seconds and loss of one step."""
    import torch

    started = time.perf_counter()
    loss = float(backward(model, batch, lambda loss: loss.backward(), precision))
    where = next(model.parameters()).device
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started, loss


def _about(rows: Sequence[TrainingRow], tokens: int, most: int) -> list[TrainingRow]:
    """Rows of middling length, about `tokens` tokens of them, at most `most`."""
    middle = sorted(rows, key=len)[len(rows) // 2 :] or list(rows)
    count = max(1, min(most, tokens // len(middle[0])))
    return middle[:count]
