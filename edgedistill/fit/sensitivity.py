"""What each matrix would cost in each number format: KLD on the token mix, predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Identity,
    Importance,
    Sensitivity,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.fidelity import read_rows, shuffled
from edgedistill.number_formats import MIXED_NAME
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec

PASSES = 96  # backward passes, over the validation rows again and again
SEED = 0
COSTS, ASKED = "sensitivity.json", "asked.json"


def measure_sensitivity(
    checkpoint: Checkpoint,
    dataset: Dataset,
    prompt: StudentSpec,
    types: Sequence[str],
    importance: Importance | None,
    out: Path,
    progress: Progress,
) -> Sensitivity:
    """Stage "sensitivity": tensor (GGUF name) -> type -> predicted mean KLD, in nats a token.

    Only types that llama.cpp really stores a matrix in (see number_formats.usable) are in it.
    `asked.json` keeps the token IDs that it was measured on.
    """
    identity = Identity(
        stage="sensitivity",
        version=1,
        spec={
            "types": sorted(types),
            "passes": PASSES,
            "seed": SEED,
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            "dataset": dataset.digest,
            **({} if importance is None else {"importance": importance.digest}),
        },
        tools=tool_versions("torch", "transformers", "tokenizers", "llama-cpp-python"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        from edgedistill.fit.fisher import measured
        from edgedistill.fit.trial import Trial, means

        asked = _asked(checkpoint, dataset, prompt)
        onnx = all(MIXED_NAME.fullmatch(kind) for kind in types)
        trial = Trial(checkpoint.folder, asked, means(importance), onnx)
        repeated = [asked[i % len(asked)] for i in range(PASSES)]
        costs = measured(trial, repeated, sorted(types), SEED, progress)
        write_json(folder / COSTS, costs)
        write_json(folder / ASKED, asked)
        return {"rows": len(asked), "tensors": len(costs)}

    done = run_stage(identity, out, progress, work)
    return Sensitivity(done.folder, done.digest, done.folder / COSTS, done.folder / ASKED)


def _asked(
    checkpoint: Checkpoint, dataset: Dataset, prompt: StudentSpec
) -> list[tuple[list[int], list[int]]]:
    """Token IDs of prompts and answers. Not of training rows: what it knows by heart, a student
    predicts after any rounding."""
    shown = StudentPrompt(checkpoint.folder, prompt)
    rows = read_rows(dataset.folder / "validation.jsonl")
    rows = sorted(rows, key=lambda row: shuffled(row.id, SEED))[:PASSES]
    return [
        (shown.prompt_ids(row.prompt, row.history), shown.answer_ids(row.answer)) for row in rows
    ]
