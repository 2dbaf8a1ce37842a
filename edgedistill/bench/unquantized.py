"""What is measured of the models before quantization: the same for every target of a runtime, and
so a stage of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.artifacts import RESUME, Identity, run_stage, tool_versions
from edgedistill.bench.agreement import answer_all
from edgedistill.bench.chain import STEPS, measure_chain, recorded
from edgedistill.bench.models import Model, context_needed, device_model, torch_model
from edgedistill.errors import DatasetError
from edgedistill.fidelity import EvalRow, read_rows, rows_that_fit
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.runtimes import TRAITS

if TYPE_CHECKING:
    from edgedistill.bench import Build

HAND_OVERS = STEPS[:2]
TOOLS = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Unquantized:
    """Answers of base, adapter, merged and exported, and the links between them, as the files that
    `measure_chain` and `answer_all` keep."""

    folder: Path
    digest: str

    def lay_out(self, resume: Path) -> None:
        """Put them where a run looks for what it has measured before."""
        resume.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("*-*.json"):
            if not (resume / file.name).exists():
                shutil.copyfile(file, resume / file.name)


def measure_unquantized(build: Build, out: Path, progress: Progress) -> Unquantized:
    """Stage "unquantized".

    Raises:
        DatasetError: there are no held-out rows. RuntimeFailure: a model cannot be run.
    """
    prompt_spec, kind = build.recipe.student, build.target.runtime
    identity = Identity(
        stage="unquantized",
        version=2,
        spec={
            "prompt": prompt_spec.model_dump(mode="json", exclude={"weights", "prune"}),
            "unquantized": TRAITS[kind].unquantized,  # llama.cpp and wllama run one file
        },
        inputs={
            name: getattr(build, name).digest
            for name in ("dataset", "student", "adapter", "checkpoint", "exported")
        },
        tools=tool_versions(*TOOLS, *TRAITS[kind].tools),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        rows = held_out(build)
        prompt = StudentPrompt(build.checkpoint.folder, prompt_spec)
        context = context_needed(prompt, rows, prompt_spec.max_tokens)
        models, resume = unquantized_models(build, prompt, context, None), folder / RESUME
        by_name = {model.name: model for model in models}
        measure_chain(by_name, rows_that_fit(rows, prompt), resume, progress, HAND_OVERS)
        answer_all(models, rows, followed(models, resume), resume, progress)
        for file in resume.glob("*.json"):
            shutil.copyfile(file, folder / file.name)
        return {"models": [model.name for model in models], "rows": len(rows)}

    done = run_stage(identity, out, progress, work)
    return Unquantized(done.folder, done.digest)


def held_out(build: Build) -> list[EvalRow]:
    rows = read_rows(build.dataset.folder / "held_out.jsonl")
    if not rows:
        raise DatasetError("there are no held-out rows to measure with")
    return rows


def unquantized_models(
    build: Build, prompt: StudentPrompt, context: int, threads: int | None
) -> list[Model]:
    """Base, adapter, merged, exported: in this order they are measured and shown."""
    spec, student = build.recipe.student, build.student.folder
    base = StudentPrompt(student, spec)
    return [
        torch_model("base", student, base, spec.max_tokens),
        torch_model("adapter", student, base, spec.max_tokens, adapter=build.adapter.folder),
        torch_model("merged", build.checkpoint.folder, prompt, spec.max_tokens),
        device_model(
            "exported",
            build.target.runtime,
            build.exported.model,
            prompt,
            spec.max_tokens,
            threads=threads,
            context_tokens=context,
        ),
    ]


def followed(models: Sequence[Model], resume: Path) -> dict[str, list[str]]:
    """Prompts whose answer needs no asking again. What ships is asked each prompt all the same:
    there, kernels for many tokens and for one may round differently."""
    names = [model.name for model in models if model.name not in ("base", "quantized")]
    return {name: recorded(resume, name).followed for name in names}
