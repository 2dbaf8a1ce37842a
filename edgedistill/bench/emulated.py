"""The last hand-over of a target that is not at hand: the quantized file on the kernels of its
processor, emulated (emulator.py). Near-ties fall the other way there, so fidelity belongs to a file
and a kernel. An emulator is slow, so this is measured on a few held-out prompts, each of them kept
as soon as it is done; its speed says nothing about the device and is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgedistill import emulator, machine
from edgedistill.artifacts import digest_of, write_json
from edgedistill.bench.chain import measured_by
from edgedistill.bench.models import Model, Runs
from edgedistill.fidelity import FLOAT_BYTES, EvalRow, Kld, per_token, shuffled, summarise
from edgedistill.progress import Progress, SilentTask
from edgedistill.recipe import BenchSpec
from edgedistill.results import Link
from edgedistill.runtimes import ONNX
from edgedistill.target import Target

STEP, BEFORE, AFTER = "aarch64", "quantized", "emulated aarch64"
NOT_MEASURED = "fidelity on aarch64 kernels was not measured: "


@dataclass(frozen=True)
class Emulated:
    """What was found: KLD of the emulated processor against this one, and its answers by row ID."""

    kld: Kld
    answers: Mapping[str, str]


def wanted(spec: BenchSpec, target: Target) -> bool:
    """Whether the target runs llama.cpp on an ARM processor whose speed is estimated, so that it is
    not at hand, and the recipe does not turn emulation off."""
    return target.runtime != ONNX and _elsewhere(spec, target)


def cannot(spec: BenchSpec, target: Target) -> list[str]:
    """A note where the target's processor is not at hand and what runs there cannot be emulated."""
    if target.runtime == ONNX and _elsewhere(spec, target):
        return [f"{NOT_MEASURED}the emulated child runs llama.cpp, not ONNX Runtime"]
    return []


def _elsewhere(spec: BenchSpec, target: Target) -> bool:
    return (
        spec.emulated_prompts > 0
        and target.latency == "roofline"
        and target.device_class in emulator.PROCESSORS
    )


def identity(spec: BenchSpec, target: Target) -> dict[str, object] | None:
    """What shapes the measurement, for the stage's name; tools that are installed later count."""
    if not wanted(spec, target):
        return None
    return {"kernels": emulator.identity(target.device_class), "prompts": spec.emulated_prompts}


def choose(rows: Sequence[EvalRow], spec: BenchSpec) -> list[EvalRow]:
    """`emulated_prompts` rows, by ID alone; a larger number keeps the ones of a smaller."""
    ranked = sorted(rows, key=lambda row: shuffled(row.id, spec.seed))
    return ranked[: spec.emulated_prompts]


def threads(target: Target) -> int:
    """No more than there are cores here: llama.cpp's threads wait for each other by spinning."""
    return min(target.threads or machine.threads(), machine.threads())


def measure_emulated(
    here: Model, there: Model, rows: Sequence[EvalRow], resume: Path, progress: Progress
) -> Emulated:
    """Run each row on this machine's kernels and on the emulated ones. A row's figures are kept
    below `resume`, so a killed run goes on with the row it was in.

    Raises:
        RuntimeFailure: the model cannot be run on one of the two.
    """
    left = [row for row in rows if not _kept(resume, row).is_file()]
    with progress.task(f"{AFTER}, slow", len(rows), "prompts") as task:
        task.advance(len(rows) - len(left))
        if left:
            with here.open() as host, there.open() as device:
                for row in left:
                    write_json(_kept(resume, row), _measured(host, device, row, resume))
                    task.advance()
    found = [json.loads(_kept(resume, row).read_text("utf-8")) for row in rows]
    kld = summarise(
        np.array([value for one in found for value in one["kld"]], dtype=np.float64),
        np.array([flag for one in found for flag in one["same"]], dtype=np.bool_),
    )
    answers = {row.id: one["answer"] for row, one in zip(rows, found, strict=True)}
    return Emulated(kld, answers)


def _kept(resume: Path, row: EvalRow) -> Path:
    return resume / f"{STEP}-{digest_of(row.id)[:16]}.json"


def _measured(host: Runs, device: Runs, row: EvalRow, resume: Path) -> dict[str, object]:
    """One row: KLD and "same most likely token" of each answer token, and the device's answer."""
    resume.mkdir(parents=True, exist_ok=True)
    scratch = [resume / f"logits-{STEP}-{name}.f32" for name in ("host", "device")]
    try:
        for runs, file in zip((host, device), scratch, strict=True):
            file.unlink(missing_ok=True)  # rows are appended
            tokens = runs.record([row], file, SilentTask()).tokens
        vocab = scratch[0].stat().st_size // (FLOAT_BYTES * tokens)
        kld, same = per_token(scratch[0], scratch[1], vocab)
    finally:
        for file in scratch:
            file.unlink(missing_ok=True)
    answer = device.answer([row], SilentTask())[0]
    return {"kld": kld.tolist(), "same": same.tolist(), "answer": answer}


def link(found: Emulated, agreement: tuple[float, float], target: Target) -> Link:
    """The hand-over with its bound; `agreement` is before and after, on the same prompts.

    The target's bound on lost agreement holds here too, but n prompts cannot show a loss smaller
    than 1/n: one prompt is always allowed.
    """
    count = len(found.answers)
    made = Link(
        STEP,
        BEFORE,
        AFTER,
        **asdict(found.kld),
        agreement_before=agreement[0],
        agreement_after=agreement[1],
        gates={"agreement_drop": max(target.gates.max_agreement_drop, round(1 / count, 9))},
        passed=True,
        prompts=count,
    )
    measured = measured_by(made)
    return replace(made, passed=all(measured[name] <= at for name, at in made.gates.items()))
