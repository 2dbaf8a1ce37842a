"""Bench: everything that is measured about one build on held-out prompts, as `report.json`.

Before it, and shared by all targets of a runtime: stage "unquantized" (unquantized.py). Agreement
with the teacher (agreement.py), the fidelity chain (chain.py) with an emulated processor
at its end where the target has another than this machine (emulated.py), speed where it can be
measured (serving.py, latency.py) or else a roofline estimate (roofline.py), and the gates
(gates.py). A failed gate does not stop the measuring: `require_gates` raises behind it. Only a file
that held-out prompts refuse while larger candidates wait is neither timed nor run elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.artifacts import (
    Adapter,
    Checkpoint,
    Dataset,
    Exported,
    Identity,
    Quantized,
    Report,
    Student,
    Traces,
    Variant,
    run_stage,
    tool_versions,
)
from edgedistill.bench.unquantized import Unquantized, measure_unquantized
from edgedistill.browser import WLLAMA, find_browser
from edgedistill.checks import check_identity
from edgedistill.errors import GateFailed
from edgedistill.progress import Progress
from edgedistill.recipe import Recipe
from edgedistill.results import Gate
from edgedistill.runtimes import TRAITS
from edgedistill.target import Target
from edgedistill.teacher import weights_identity
from edgedistill.tokenmix import TokenMix

REPORT = "report.json"
NOT_MEASURED = {"licence", "port", "start_seconds", "weights", "api_key_env"}
# Prompts that are asked only where a target is emulated or runs in a browser.
NOT_EVERYWHERE = {"emulated_prompts", "browser_prompts"}
NOT_OF_THE_WINNER = {"formats", "allocations", "kernels", "description"}
TOOLS = ("llama-cpp-python", "torch", "transformers", "peft", "numpy", "openai")


@dataclass(frozen=True)
class Build:
    """All that one build made, up to here."""

    recipe: Recipe
    target: Target
    mix: TokenMix
    traces: Traces
    dataset: Dataset
    student: Student
    adapter: Adapter
    checkpoint: Checkpoint
    exported: Exported
    variant: Variant | None  # what won, where that is an allocation and no stock format
    quantized: Quantized


def bench(
    recipe: Recipe,
    target: Target,
    mix: TokenMix,
    traces: Traces,
    dataset: Dataset,
    student: Student,
    adapter: Adapter,
    checkpoint: Checkpoint,
    exported: Exported,
    variant: Variant | None,
    quantized: Quantized,
    out: Path,
    progress: Progress,
) -> Report:
    """Measure a build. Files: report.json (a BenchResult), fidelity.json (the part of it that does
    not depend on the clock), answers.jsonl (every held-out prompt with every model's answer).

    Raises:
        DatasetError: there are no held-out rows.
        TeacherError: latency is to be measured and the teacher cannot be used.
        RuntimeFailure: a model cannot be run.
    """
    build = Build(
        recipe, target, mix, traces, dataset, student, adapter, checkpoint, exported,
        variant, quantized,
    )  # fmt: skip

    shared = measure_unquantized(build, out, progress)

    def work(folder: Path) -> Mapping[str, Any]:
        from edgedistill.bench.measuring import measure_build

        return measure_build(build, shared, folder, out, progress)

    done = run_stage(_identity(build, shared), out, progress, work)
    return Report(done.folder, done.digest, done.folder / REPORT)


def refusal(report: Report) -> str:
    """Why held-out prompts refuse the file, where another candidate may do better; else ""."""
    from edgedistill.bench.gates import refused_by

    return refused_by(_gates(report))


def require_gates(report: Report) -> None:
    """Raise when a bound of recipe or target is broken.

    Raises:
        GateFailed: names the first failed step, with every failed figure.
    """
    from edgedistill.bench.gates import failure

    failed = failure(_gates(report))
    if failed is not None:
        step, figures = failed
        hint = "everything measured is in this report, and in report.html beside it"
        if refusal(report):
            hint += (
                "\n  no other candidate is inside the bounds: give the target a larger format, or "
                "an allocation with `fit`, or loosen its gates"
            )
        raise GateFailed(step, figures, where=str(report.file), hint=hint)


def _gates(report: Report) -> list[Gate]:
    return [Gate(**gate) for gate in json.loads(report.file.read_text("utf-8"))["gates"]]


def _identity(build: Build, shared: Unquantized) -> Identity:
    from edgedistill.bench import emulated

    recipe, target, teacher = build.recipe, build.target, build.recipe.teacher
    inputs = {
        name: getattr(build, name).digest
        for name in (
            "traces", "dataset", "student", "adapter", "checkpoint", "exported", "quantized"
        )
    }  # fmt: skip
    inputs["unquantized"] = shared.digest
    if build.variant is not None:
        inputs["variant"] = build.variant.checkpoint.digest
    return Identity(
        stage="bench",
        version=8,
        spec={
            "recipe": {"name": recipe.name, "description": recipe.description},
            "bench": recipe.bench.model_dump(mode="json", exclude=NOT_EVERYWHERE),
            "emulated": emulated.identity(recipe.bench, target),
            "gates": recipe.gates.model_dump(mode="json"),
            "check": check_identity(recipe.check),
            "prompt": recipe.student.model_dump(mode="json", exclude={"weights", "prune"}),
            "teacher": {
                **teacher.model_dump(mode="json", exclude=NOT_MEASURED),
                "weights": weights_identity(teacher),
            },
            "target": target.model_dump(mode="json", exclude=NOT_OF_THE_WINNER),
            "machine": machine.fingerprint(),
            **_browser(build),
        },
        inputs=inputs,
        tools=tool_versions(*TOOLS, *TRAITS[target.runtime].tools),
    )


def _browser(build: Build) -> dict[str, Any]:
    """Only a target that runs in a browser is measured again when there is one, or another."""
    if build.target.runtime != "wllama":
        return {}
    shown = {"wllama": WLLAMA.version, "here": find_browser() is not None}
    return {"browser": {**shown, "prompts": build.recipe.bench.browser_prompts}}
