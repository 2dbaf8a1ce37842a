"""Packed batches, the head in chunks, several parts and processes: the loss stays the same."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_student
from tiny_families import FAMILIES, family_student
from training_rows import packed_loss, padded, rows_of_lengths

from edgedistill.distill.model import trained_model
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.torch_runtime import deterministic
from edgedistill.training import head, packing
from edgedistill.training.fused import fuse, is_fused
from edgedistill.training.history import WINDOW, risen
from edgedistill.training.learner import Learner, Packer, backward, hold_in_bf16, nll_loss
from edgedistill.training.packing import pack, packed_attention, split

SPEC = DistillSpec(lora=LoraSpec(rank=4, alpha=8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained_model(tiny_student(tmp_path_factory.mktemp("student")).folder, SPEC)


def gradients(model: Any) -> dict[str, Any]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("on_gpus_way", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_padded_rows(
    name: str, on_gpus_way: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model(family_student(tmp_path, name).folder, SPEC)
    rows = rows_of_lengths(25, 9, 40, 9, 31)
    if on_gpus_way:  # one padded kernel for all rows; here, on the CPU
        monkeypatch.setattr(packing, "APART", ())
    loss = packed_loss(model, rows)
    found = gradients(model)
    wanted = model(**padded(rows)).loss
    wanted.backward()
    assert abs(float(loss) - float(wanted.detach())) < 1e-5
    for at, gradient in gradients(model).items():
        torch.testing.assert_close(found[at], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tuning", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_layers_change_nothing(name: str, tuning: Any, tmp_path: Path) -> None:
    # To be compiled is not to be fused; it is not compiled here.
    spec = SPEC.model_copy(update={"tuning": tuning, "compile": True})
    model = trained_model(family_student(tmp_path, name).folder, spec)
    torch.manual_seed(0)
    for at, parameter in model.named_parameters():
        if "lora_B" in at:  # of zeros, nothing of A could be seen
            torch.nn.init.normal_(parameter, std=0.2)
    rows = rows_of_lengths(25, 9, 40, 9, 31)
    wanted, before = packed_loss(model, rows), gradients(model)
    fuse(model)
    fused = [m for m in model.modules() if is_fused(m)]
    assert any(hasattr(m, "lora_A") for m in fused) == (tuning != "dora")
    assert any("RMSNorm" in str(type(m)) for m in fused) == ("gemma" not in name)
    assert abs(float(packed_loss(model, rows)) - float(wanted)) < 1e-5
    for at, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[at], rtol=1e-3, atol=1e-6)


def test_a_fused_model_goes_with_its_last_reference(tmp_path: Path) -> None:
    model = trained_model(tiny_student(tmp_path).folder, SPEC)
    fuse(model)
    layer = weakref.ref(model.get_base_model().get_decoder().layers[0])
    kept = layer()
    assert kept is not None
    inner = weakref.ref(kept.mlp.down_proj)
    del kept
    gc.disable()
    try:
        del model
        assert inner() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tokens", [30, 100])
def test_processes_have_as_many_parts(tokens: int) -> None:
    rows = rows_of_lengths(25, 60, 40, 90, 31, 17, 70, 44)
    found = [Packer(tokens, rank, 3)([rows])["parts"] for rank in range(3)]
    assert len({len(parts) for parts in found}) == 1
    learnt = sum(float((p["weights"] > 0).sum()) for parts in found for p in parts)
    assert learnt == sum(row.supervised for row in rows)


def test_fused_layers_do_as_peft_says(tmp_path: Path) -> None:
    own = trained_model(tiny_student(tmp_path).folder, SPEC)
    for at, parameter in own.named_parameters():
        if "lora_B" in at:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.tensor([[5, 9, 60, 7]])
    with own.disable_adapter():
        wanted = own(input_ids=ids).logits
    fuse(own)
    assert not torch.allclose(own(input_ids=ids).logits, wanted, atol=1e-3)
    with own.disable_adapter():
        torch.testing.assert_close(own(input_ids=ids).logits, wanted)


def test_a_row_is_not_changed_by_its_neighbours(model: Any) -> None:
    first, second, third = rows_of_lengths(12, 20, 9)
    other = replace(second, prompt=second.prompt[::-1])
    plain = model.get_base_model()
    with torch.no_grad(), packed_attention(plain):
        one, two = (
            packing.hidden_states(plain, pack([first, between, third]))
            for between in (second, other)
        )
    assert torch.equal(one[:4], two[:4])
    assert torch.equal(one[8:], two[8:])
    assert not torch.equal(one[4:8], two[4:8])


def test_the_model_answers_as_usual_behind_a_packed_pass(model: Any) -> None:
    ids = torch.tensor([[5, 9, 60, 7]])
    before = model(input_ids=ids).logits
    packed_loss(model, rows_of_lengths(9, 12))
    assert torch.equal(model(input_ids=ids).logits, before)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("tokens", [10, 30, 4096])
def test_parts_change_nothing(model: Any, tokens: int) -> None:
    rows = rows_of_lengths(25, 9, 40, 9, 31)
    whole = packed_loss(model, rows)
    wanted = gradients(model)
    assert abs(float(packed_loss(model, rows, tokens)) - float(whole)) < 1e-5
    for at, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[at], rtol=1e-3, atol=1e-6)


def test_rows_are_split_in_order() -> None:
    rows = rows_of_lengths(25, 9, 40, 9, 31)
    assert [[len(row) for row in part] for part in split(rows, 40)] == [[25, 9], [40], [9, 31]]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_head_in_chunks_changes_nothing(
    tuning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPEC.model_copy(update={"tuning": tuning})
    model = trained_model(tiny_student(tmp_path).folder, spec)
    rows = rows_of_lengths(25, 9, 40, answer=7)
    whole = packed_loss(model, rows)
    wanted = gradients(model)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 5 * model.config.vocab_size)
    assert abs(float(packed_loss(model, rows)) - float(whole)) < 1e-5
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for at, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[at], rtol=1e-3, atol=1e-6)


def test_a_weight_of_two_is_the_row_twice(model: Any) -> None:
    first, second = rows_of_lengths(12, 20)
    twice = packed_loss(model, [first, first, second])
    wanted = gradients(model)
    assert abs(float(packed_loss(model, [replace(first, weight=2.0), second]) - twice)) < 1e-5
    for at, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[at], rtol=1e-3, atol=1e-6)


def test_a_light_row_teaches_less_also_alone_in_its_batch(model: Any) -> None:
    (row,) = rows_of_lengths(12)
    found = []
    for weight in (1.0, 0.25):
        batch = Packer(4096)([[replace(row, weight=weight)]])
        found.append(backward(Learner(model, nll_loss), batch, lambda loss: None, "fp32"))
    assert float(found[1]) == pytest.approx(0.25 * float(found[0]))


@pytest.mark.parametrize("count", [1, 5])
def test_processes_share_a_batch_and_its_loss(model: Any, count: int) -> None:
    rows = rows_of_lengths(*[25, 9, 40, 9, 31][:count])
    whole = packed_loss(model, rows)
    wanted = gradients(model)
    learner, losses = Learner(model, nll_loss), []
    for rank in range(2):
        batch = Packer(4096, rank, 2)([rows])
        losses.append(float(backward(learner, batch, lambda loss: loss.backward(), "fp32")))
    assert abs(sum(losses) / 2 - float(whole)) < 1e-5
    for at, gradient in gradients(model).items():  # DDP takes the mean
        torch.testing.assert_close(gradient / 2, wanted[at], rtol=1e-3, atol=1e-6)


def test_frozen_matrices_in_bf16_give_what_autocast_gives(tmp_path: Path) -> None:
    folder, batch = tiny_student(tmp_path).folder, Packer(4096)([rows_of_lengths(25, 9, 40)])
    losses = []
    for hold in (False, True):
        model = trained_model(folder, SPEC)
        if hold:
            hold_in_bf16(model.get_base_model(), "cpu")
            kinds = {p.dtype for n, p in model.named_parameters() if "q_proj.base_layer" in n}
            assert kinds == {torch.bfloat16}
        learner = Learner(model, nll_loss)
        losses.append(backward(learner, batch, lambda loss: loss.backward(), "bf16"))
    assert torch.equal(losses[0], losses[1])


def test_a_gpu_holds_all_that_is_frozen_in_bf16(tmp_path: Path) -> None:
    model = trained_model(tiny_student(tmp_path).folder, SPEC)
    rows = rows_of_lengths(25, 9, 40)
    plain = backward(Learner(model, nll_loss), Packer(4096)([rows]), lambda loss: None, "bf16")
    hold_in_bf16(model.get_base_model(), "cuda")
    fuse(model)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = Packer(4096)([rows])
    held = backward(Learner(model, nll_loss), batch, lambda loss: loss.backward(), "bf16")
    assert abs(float(held) - float(plain)) < 0.02 * float(plain)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@pytest.mark.gpu
def test_a_gpu_is_deterministic_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    folder, rows = tiny_student(tmp_path).folder, rows_of_lengths(25, 9, 40, 9, 31)
    plain = SPEC.model_copy(update={"compile": True})  # not fused
    wanted = packed_loss(trained_model(folder, plain), rows)
    deterministic(0)
    found = []
    for _ in range(2):
        learner = Learner(trained_model(folder, SPEC), nll_loss).to(torch.device("cuda"))
        batch = packing.moved(Packer(4096, mean_weight=1.0)([rows]), torch.device("cuda"))
        loss = backward(learner, batch, lambda loss: loss.backward(), "fp32")
        found.append((loss, gradients(learner)))
    assert abs(float(found[0][0]) - float(wanted)) < 1e-5
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(g, found[1][1][at]) for at, g in found[0][1].items())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients(tmp_path: Path) -> None:
    model = trained_model(tiny_student(tmp_path).folder, SPEC)
    plain = packed_loss(model, rows_of_lengths(25, 9, 40))
    wanted = gradients(model)
    Learner(model, nll_loss).compile_layers()
    for rows in (rows_of_lengths(12, 7), rows_of_lengths(25, 9, 40)):  # of other lengths first
        gradients(model)
        loss = packed_loss(model, rows)
    assert abs(float(loss) - float(plain)) < 1e-5
    for at, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[at], rtol=1e-3, atol=1e-6)


def test_a_checkpoint_holds_what_is_trained(model: Any) -> None:
    learner = Learner(model, nll_loss)
    state = learner.state_dict()
    assert state
    assert all("lora_" in name for name in state)
    wanted = {name: values + 1 for name, values in state.items()}
    learner.load_state_dict(wanted)
    for name, values in learner.state_dict().items():
        torch.testing.assert_close(values, wanted[name])


@pytest.mark.parametrize(
    ("losses", "uneven", "found"),
    [
        ([3.0, 2.9] * 8 + [6.0] * WINDOW, 0, True),
        ([3.0, 2.9, *[11.0] * WINDOW], 0, True),  # broken at once
        ([3.0, 1.0, 0.5, 0.3] * 8, 0, False),
        ([0.5, 0.7, *[2.0] * WINDOW], 0, False),  # the first batches were easy
        ([0.3, 0.1] * 8 + [0.2, 0.35] * 4, 0, False),  # within the noise of batches
        ([9.0] * (WINDOW + 1), 0, False),  # too short to tell
        ([0.003] * WINDOW + [0.001, 0.2, 0.001, 0.3] * 2, 0, False),  # measured: a proxy's round
        ([0.003] * WINDOW + [0.7] * WINDOW, math.log(2), False),  # none but rows with DPO's loss
        ([0.003] * WINDOW + [1.2] * WINDOW, math.log(2), True),
    ],
)
def test_a_loss_above_its_start_is_told_from_noise(
    losses: list[float], uneven: float, found: bool
) -> None:
    assert (risen(losses, uneven) is not None) == found
