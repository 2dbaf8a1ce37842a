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
    """A base on the grid of Q4_1 and a small update of it everywhere: rounding to that grid undoes
    the update, which no single matrix tells."""
    student = tiny.tiny_student(tmp_path / "student")
    dataset = tiny.tiny_dataset(tmp_path / "data", 8)
    file = student.folder / "model.safetensors"
    state, chance = load_file(file), np.random.default_rng(1)
    for name, values in state.items():
        if values.ndim == 2 and "embed" not in name:
            grid = quantize_dequantize(torch.from_numpy(values), "Q4_1").numpy()
            update = 0.006 * np.outer(*(chance.standard_normal(n) for n in values.shape))
            state[name] = (grid + update).astype(np.float32)
    save_file(state, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    checkpoint = Checkpoint(student.folder, "updated")
    kinds = ("Q4_0", "Q4_1", "Q5_0")
    found = measure_sensitivity(checkpoint, dataset, SPEC, kinds, None, out, Silent())
    costs = json.loads(found.file.read_text("utf-8"))
    asked = json.loads(found.asked.read_text("utf-8"))
    trial = Trial(student.folder, asked, {})
    for kind in kinds:
        total = sum(by_type[kind] for by_type in costs.values())
        assert total == pytest.approx(trial.kld(dict.fromkeys(costs, kind)), rel=1e-6)
