"""What a training run needs, estimated before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_student
from tiny_families import FAMILIES, family_student
from training_rows import packed_loss, rows_of_lengths

from edgedistill.distill.model import trained_model
from edgedistill.errors import TrainingError
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.training.learner import Learner, Packer, autocast, nll_loss
from edgedistill.training.need import activation_bytes, cut, dimensions, dimensions_of, needed_bytes
from edgedistill.training.packing import packed_attention

SPEC = DistillSpec(lora=LoraSpec(rank=16), precision="fp32")


def kept_bytes(model: Any, rows: int, precision: str) -> int:
    """What autograd keeps of `rows` rows of 64 tokens."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            kept[place.data_ptr()] = place
        return tensor

    learner, batch = Learner(model, nll_loss), Packer(4096)([rows_of_lengths(*[64] * rows)])
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, packed_attention(learner.plain), autocast(torch.device("cpu"), precision):
        learner(batch["parts"][0])
    return sum(place.nbytes() for place in kept.values())


def test_shares_of_frozen_weights_need_less_but_never_less_than_an_evaluation() -> None:
    config = {
        "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14336,
        "num_hidden_layers": 32, "vocab_size": 32000, "num_key_value_heads": 8,
    }  # fmt: skip
    found, alone = dimensions_of(config), SPEC.model_copy(update={"processes": 8})
    shared = alone.model_copy(update={"shard": True})
    whole = needed_bytes(found, alone, 2048, False)
    assert needed_bytes(found, shared, 2048, False) < 0.7 * whole
    assert needed_bytes(found, shared, 16, True) > 4 * found.matrices


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_activations_are_bounded_from_above_and_not_by_far(
    name: str, precision: Any, tuning: Any, tmp_path: Path
) -> None:
    assert name in FAMILIES
    folder = family_student(tmp_path, name).folder
    spec = SPEC.model_copy(update={"precision": precision, "tuning": tuning})
    model = trained_model(folder, spec)
    counted = kept_bytes(model, 4, precision) - kept_bytes(model, 2, precision)
    estimated = activation_bytes(dimensions(folder), spec, 128, checkpointing=False)
    assert counted < estimated < 1.6 * counted


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_trained_parameters_are_counted(name: str, tmp_path: Path) -> None:
    folder = family_student(tmp_path, name).folder
    model = trained_model(folder, SPEC)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = dimensions(folder).adapter(16)
    if name == "phi3":  # its fused layers need less
        assert trained < counted < 1.3 * trained
    else:
        assert counted == pytest.approx(trained, rel=0.05)
    base = sum(p.numel() for p in model.parameters()) - trained
    assert dimensions(folder).parameters == pytest.approx(base, rel=0.01)


def test_less_memory_means_smaller_parts_then_activations_twice_then_a_refusal(
    tmp_path: Path,
) -> None:
    found, rows = dimensions(tiny_student(tmp_path).folder), rows_of_lengths(*[64] * 8)

    def need(tokens: int, checkpointing: bool) -> int:
        return needed_bytes(found, SPEC, tokens, checkpointing)

    assert cut(found, SPEC, rows, "cpu", None).tokens == 512
    smaller = cut(found, SPEC, rows, "cpu", need(300, False))
    assert (smaller.tokens, smaller.checkpointing) == (256, False)
    twice = cut(found, SPEC, rows, "cpu", need(64, False) - 1)
    assert twice.checkpointing
    with pytest.raises(TrainingError, match=r"needs about .* GB of memory, and 0.1 GB are free"):
        cut(found, SPEC, rows, "cpu", 100_000_000)
    off = SPEC.model_copy(update={"gradient_checkpointing": "off"})
    with pytest.raises(TrainingError, match="gradient_checkpointing to auto"):
        cut(found, off, rows, "cpu", need(64, False) - 1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_activations_computed_twice_give_the_same_gradients(name: str, tmp_path: Path) -> None:
    model = trained_model(family_student(tmp_path, name).folder, SPEC).train()
    rows, found = rows_of_lengths(25, 9, 40), []
    for twice in (False, True):
        if twice:
            Learner(model, nll_loss).compute_twice()
        loss = packed_loss(model, rows)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((float(loss), grads))
        model.zero_grad(set_to_none=True)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)
