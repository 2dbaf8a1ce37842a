from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from edgedistill.artifacts import Checkpoint
from edgedistill.fidelity import kl_divergence, read_rows
from edgedistill.fit.formats import quantize_dequantize
from edgedistill.fit.sensitivity import measure_sensitivity
from edgedistill.fit.trial import Trial
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.tensors import matrices, read_layout
from edgedistill.torch_runtime import TorchModel, load_model

SPEC = StudentSpec(weights="tiny")
Measured = tuple[Checkpoint, Path, dict[str, dict[str, float]]]
TYPES = ("Q4_0", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
) -> Measured:
    checkpoint = Checkpoint(tiny.tiny_student(tmp_path_factory.mktemp("s")).folder, "tiny")
    dataset = tiny.tiny_dataset(tmp_path_factory.mktemp("d"), 8)
    out = tmp_path_factory.mktemp("out")
    found = measure_sensitivity(checkpoint, dataset, SPEC, TYPES, None, out, Silent())
    return checkpoint, dataset.folder, json.loads(found.file.read_text("utf-8"))


def test_every_matrix_in_every_type(
    measured: Measured,
) -> None:
    checkpoint, _, costs = measured
    assert set(costs) == set(matrices(read_layout(checkpoint.folder)))
    for by_type in costs.values():
        assert by_type["Q4_0"] > by_type["Q6_K"] > by_type["Q8_0"] > 0


def test_the_prediction_is_the_kld_that_is_measured(
    measured: Measured,
) -> None:
    """Matrix by matrix of a layer: so few draws, so within a factor of two."""
    checkpoint, dataset, costs = measured
    shown = StudentPrompt(checkpoint.folder, SPEC)
    asked = []
    for row in read_rows(dataset / "validation.jsonl"):
        prompt = shown.prompt_ids(row.prompt)
        asked.append((prompt + shown.answer_ids(row.answer), len(prompt)))
    before = np.concatenate(list(TorchModel(checkpoint.folder).logits(asked)))
    for name, (source, _, _) in matrices(read_layout(checkpoint.folder)).items():
        if not name.startswith("blk.0.ffn"):
            continue
        model = load_model(checkpoint.folder)
        own = dict(model.named_parameters())[source]
        with torch.no_grad():
            own.copy_(quantize_dequantize(own.data, "Q4_0"))
        after = np.concatenate(list(TorchModel.of(model).logits(asked)))
        real = kl_divergence(before, after).mean()
        assert costs[name]["Q4_0"] == pytest.approx(real, rel=1.0)
        assert real == pytest.approx(costs[name]["Q4_0"], rel=1.0)


def test_errors_that_add_up_are_seen(tmp_path: Path) -> None:
    """A base on the grid of Q4_1, and a step of training in every matrix: rounding to that grid
    undoes the step, in all of them in the same direction, which no single one tells."""
    student = tiny.tiny_student(tmp_path / "student")
    dataset = tiny.tiny_dataset(tmp_path / "data", 8)
    model = load_model(student.folder)
    shown = StudentPrompt(student.folder, SPEC)
    for row in read_rows(dataset.folder / "validation.jsonl"):
        ids = torch.tensor([shown.prompt_ids(row.prompt) + shown.answer_ids(row.answer)])
        model(input_ids=ids, labels=ids).loss.backward()
    file = student.folder / "model.safetensors"
    state = load_file(file)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            grid = quantize_dequantize(parameter.data, "Q4_1")
            state[name] = (grid - 0.002 * parameter.grad.sign()).numpy()
    save_file(state, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    checkpoint = Checkpoint(student.folder, "updated")
    kinds = ("Q4_0", "Q4_1", "Q5_0")
    found = measure_sensitivity(checkpoint, dataset, SPEC, kinds, None, out, Silent())
    costs = json.loads(found.file.read_text("utf-8"))
    asked = json.loads(found.asked.read_text("utf-8"))
    trial = Trial(student.folder, asked, {})
    totals = {kind: sum(by_type[kind] for by_type in costs.values()) for kind in kinds}
    for kind, total in totals.items():
        assert total == pytest.approx(trial.kld(dict.fromkeys(costs, kind)), rel=1e-6)
    alone = {kind: sum(trial.kld({name: kind}) for name in costs) for kind in ("Q4_0", "Q4_1")}
    raised = {kind: totals[kind] / alone[kind] for kind in alone}
    assert raised["Q4_1"] > 1.5 * raised["Q4_0"]
