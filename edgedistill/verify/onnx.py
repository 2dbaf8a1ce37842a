"""The hand-over check of an ONNX export: does it behave in onnxruntime-genai as the merged
checkpoint does? Tokenizer, chat template, stop token and vocabulary by name; then KL divergence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Exported,
    Identity,
    run_stage,
    tool_versions,
)
from edgedistill.errors import DatasetError, RuntimeFailure
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.handover import KLD_ROWS, chosen_rows, conversations, difference
from edgedistill.onnx_runtime import OnnxGenai
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtimes import ONNX
from edgedistill.verify import Handover

TEMPLATE_KEY = "chat_template"


def verify_onnx(
    checkpoint: Checkpoint,
    exported: Exported,
    dataset: Dataset,
    prompt: StudentSpec,
    max_mean_kld: float,
    out: Path,
    progress: Progress,
) -> None:
    """Stage "verify" for an ONNX export; its manifest's facts hold the figures.

    Raises:
        GateFailed: step "export"; the message names exactly what differs.
    """
    identity = Identity(
        stage="verify",
        version=1,
        spec={
            "runtime": ONNX,
            "max_mean_kld": max_mean_kld,
            "rows": KLD_ROWS,
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            "exported": exported.digest,
            "dataset": dataset.digest,
        },
        tools=tool_versions(
            "onnxruntime-genai", "onnxruntime", "torch", "transformers", "tokenizers"
        ),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        student = StudentPrompt(checkpoint.folder, prompt)
        task = Handover(checkpoint.folder, exported.model, student, progress, runtime=ONNX)
        validation = read_rows(dataset.folder / "validation.jsonl")
        held_out = read_rows(dataset.folder / "held_out.jsonl")
        return _check(task, [*validation, *held_out], validation, max_mean_kld, folder)

    run_stage(identity, out, progress, work)


def _check(
    task: Handover,
    rows: Sequence[EvalRow],
    validation: Sequence[EvalRow],
    max_mean_kld: float,
    folder: Path,
) -> Mapping[str, Any]:
    if not validation:
        raise DatasetError("there are no validation rows to check the export on")
    chosen = chosen_rows(validation)
    before, after = folder / "merged.f32", folder / "exported.f32"
    try:
        with OnnxGenai(task.model, context_tokens=task.longest(rows)) as runtime:
            _same_vocabulary(task, runtime)
            task.same_stop(runtime)
            _same_template(task, runtime, rows)
            compared = task.same_tokens(runtime, rows)
            for row in chosen:
                runtime.logits(*task.supervised(row), after)
    except RuntimeFailure as error:
        task.fail(f"{ONNX} cannot use the exported model: {error.what}", error)
    kld = task.kld(chosen, before, after)
    before.unlink()
    after.unlink()
    if not kld.mean_kld <= max_mean_kld:
        task.fail(
            f"mean KLD of merged to exported is {kld.mean_kld:.3g}, above the bound of "
            f"{max_mean_kld:g} (over {kld.tokens} answer tokens)"
        )
    return {**asdict(kld), "rows": len(chosen), "texts_compared": compared}


def _same_vocabulary(task: Handover, runtime: OnnxGenai) -> None:
    """genai_config.json, the embedding and the training tokenizer count the same tokens. (That the
    model gives so many logits, the runtime itself checks at each answer.)"""
    config = json.loads((task.checkpoint / "config.json").read_text("utf-8"))
    for what, count in (
        ("rows in the checkpoint's embedding", config["vocab_size"]),
        ("tokens in the tokenizer that training used", task.student.vocab_size),
    ):
        if count != runtime.facts["n_vocab"]:
            task.fail(
                f"genai_config.json has a vocab_size of {runtime.facts['n_vocab']}, but there are "
                f"{count} {what}"
            )


def _same_template(task: Handover, runtime: OnnxGenai, rows: Sequence[EvalRow]) -> None:
    """The file is the one training used, and genai renders it as training did: its engine is not
    Jinja."""
    config = json.loads((task.checkpoint / TOKENIZER_CONFIG).read_text("utf-8"))
    found = runtime.metadata().get(TEMPLATE_KEY)
    if found != config["chat_template"]:
        what = difference(config["chat_template"], found)
        task.fail(f"the chat template is not the one training used: {what}")
    talks = list(conversations())
    talks += [
        (f"prompt {row.id}", task.student.messages(row.prompt, row.history), True) for row in rows
    ]
    for label, talk, asks in talks:
        wanted = task.student.render_messages(talk, add_generation_prompt=asks)
        rendered = runtime.apply_chat_template(talk, asks)
        if rendered != wanted:
            what = difference(wanted, rendered)
            task.fail(f"{ONNX} renders the chat template differently for {label}: {what}")
