"""Which columns of each matrix matter: the mean square of its inputs over the token mix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Identity,
    Importance,
    run_stage,
    tool_versions,
)
from edgedistill.fidelity import read_rows
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec

IMPORTANCE = "importance.gguf"


def weigh(
    checkpoint: Checkpoint, dataset: Dataset, prompt: StudentSpec, out: Path, progress: Progress
) -> Importance:
    """Stage "importance": measured on all training rows, prompt and teacher's answer."""
    identity = Identity(
        stage="importance",
        version=1,
        spec={"prompt": prompt.model_dump(mode="json", include={"system", "prompt"})},
        inputs={"checkpoint": checkpoint.digest, "dataset": dataset.digest},
        tools=tool_versions("torch", "transformers", "tokenizers"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        from edgedistill.activations import measure_importance
        from edgedistill.importance import write_importance

        shown = StudentPrompt(checkpoint.folder, prompt)
        rows = read_rows(dataset.folder / "train.jsonl")
        asked = [
            shown.prompt_ids(row.prompt, row.history) + shown.answer_ids(row.answer) for row in rows
        ]
        with progress.task("measure importance", len(asked), "prompts") as task:
            found = measure_importance(checkpoint.folder, asked, "token mix", task)
        write_importance(folder / IMPORTANCE, found)
        return {"rows": len(asked), "matrices": len(found.sums)}

    done = run_stage(identity, out, progress, work)
    return Importance(done.folder, done.digest, done.folder / IMPORTANCE)
