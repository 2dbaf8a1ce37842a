"""The other side is llama.cpp itself: ggml-base's quantize and to_float, and a quantized file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from edgedistill import ggml
from edgedistill.artifacts import Checkpoint
from edgedistill.export import export
from edgedistill.fit import formats
from edgedistill.fit.formats import (
    Grid,
    fake_quantize,
    freeze,
    quantize_dequantize,
    quantize_on,
)
from edgedistill.number_formats import FORMATS, usable
from edgedistill.progress import Silent
from edgedistill.runtime import quantize_file
from edgedistill.weights import cached

STUDENT = "smollm2-135m-instruct-q4_1"
NAMES = [name for name in FORMATS if name != "F32"]
COLUMNS, ROWS = 512, 24
WEIGHTS = (
    "normal", "outliers", "float16", "ties", "zeros", "minus_zeros", "constant", "halved",
    "positive", "tiny", "subnormal", "huge", "mixed", "real",
)  # fmt: skip
IMPORTANCES = ("none", "even", "uneven", "half_zero", "zero")


def weights(kind: str) -> Tensor:
    """[ROWS, COLUMNS] of one kind."""
    chance = torch.Generator().manual_seed(7)
    normal = torch.randn(ROWS, COLUMNS, generator=chance)
    other = torch.rand(ROWS, COLUMNS, generator=chance)
    made = {
        "normal": 0.05 * normal,
        "outliers": 0.05 * normal * torch.where(other < 0.01, 40.0, 1.0),
        "float16": (0.05 * normal).half().float(),
        "ties": (4 * normal).round(),
        "zeros": torch.zeros(ROWS, COLUMNS),
        "minus_zeros": -torch.zeros(ROWS, COLUMNS),
        "constant": normal[:, :1].repeat(1, COLUMNS),
        "halved": normal.clamp(min=-0.0),
        "positive": 0.05 * normal.abs(),
        "tiny": 1e-7 * normal,
        "subnormal": 1e-39 * normal,
        "huge": 3e4 * normal,
        "mixed": normal * 10 ** (15 * other - 12),
    }
    return made[kind] if kind in made else torch.from_numpy(real_tensor())


def real_tensor() -> np.ndarray:
    return np.asarray(tiny.weights(300, 3)["model.layers.0.mlp.down_proj.weight"][:ROWS])


def importances(kind: str) -> Tensor | None:
    drawn = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(9))
    made = {
        "even": drawn.abs() + 0.1,
        "uneven": (3 * drawn).exp(),
        "half_zero": drawn.clamp(min=0),
        "zero": torch.zeros(COLUMNS),
    }
    return made.get(kind)


def library(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    given = None if importance is None else importance.numpy()
    stored = ggml.quantize(weight.numpy(), name, given)
    return torch.from_numpy(ggml.dequantize(stored, name, weight.shape[1]))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """-0 is not 0; any NaN (scales beyond float16: infinity times 0) is as good as another."""
    nan = a.isnan() & b.isnan()
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | nan).all())


def same_values(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_as_the_library(name: str, kind: str, importance: str) -> None:
    weight, given = weights(kind), importances(importance)
    wanted = library(weight, name, given)
    assert same_bits(quantize_dequantize(weight, name, given), wanted)
    same = same_values if name.endswith("_K") else same_bits  # see quantize_on
    assert same(quantize_on(weight, freeze(weight, name, given)), wanted)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Rows of each kind of matrix of the shipped student, in its first, middle and last layer."""
    file = cached(STUDENT)
    if file is None:
        pytest.skip(f"the weights {STUDENT} are not on this machine; a build fetches them")
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    wanted = {"token_embd.weight"} | {
        name for name in found if name.startswith(("blk.0.", "blk.15.", "blk.29."))
    }
    return {
        name: torch.from_numpy(dequantize(found[name].data[:ROWS], found[name].tensor_type))
        for name in sorted(wanted)
        if len(found[name].shape) == 2
    }


@pytest.mark.parametrize("name", NAMES)
def test_trained_tensors(name: str, trained: dict[str, Tensor]) -> None:
    fitting = {k: w for k, w in trained.items() if usable(name, w.shape[1]) == name}
    assert fitting
    for tensor, weight in fitting.items():
        uneven = weight.square().mean(0) + 1e-6
        for importance in (None, uneven):
            wanted = library(weight, name, importance)
            assert same_bits(quantize_dequantize(weight, name, importance), wanted), tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student = tiny.tiny_student(tmp_path_factory.mktemp("student"))
    out = tmp_path_factory.mktemp("out")
    checkpoint = Checkpoint(student.folder, "checkpoint")
    return export(checkpoint, student, "recipe", out, Silent()).model


@pytest.mark.parametrize(
    ("file_type", "name"),
    [(name, name) for name in ("BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "Q6_K")]
    + [("Q5_K_M", "Q5_K"), ("Q4_K_M", "Q4_K"), ("Q3_K_M", "Q3_K"), ("Q2_K", "Q2_K")],
)
def test_as_a_quantized_file(file_type: str, name: str, exported: Path, tmp_path: Path) -> None:
    """Every matrix in the type that llama_model_quantize gave it, the embeddings included."""
    quantize_file(exported, tmp_path / "made.gguf", file_type, 1)
    source = {tensor.name: tensor for tensor in GGUFReader(exported).tensors}
    seen = set()
    for made in GGUFReader(tmp_path / "made.gguf").tensors:
        kind = made.tensor_type.name
        if len(made.shape) == 2 and kind != "F16":
            weight = torch.from_numpy(np.array(source[made.name].data, np.float32))
            stored = np.array(made.data).view(np.uint8)
            wanted = torch.from_numpy(ggml.dequantize(stored, kind, weight.shape[1]))
            assert same_bits(quantize_dequantize(weight, kind), wanted), made.name
            seen.add(kind)
    assert name in seen


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "IQ4_NL", "Q4_K", "int4-b32-asym"])
def test_the_gradient_goes_straight_through(name: str) -> None:
    weight = weights("normal").requires_grad_()
    upstream = torch.randn(ROWS, COLUMNS)
    value = fake_quantize(weight, name)
    value.backward(upstream)
    assert torch.equal(value, quantize_dequantize(weight, name))
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("importance", ["none", "even"])
def test_a_moved_weight_stays_on_the_frozen_grid(name: str, importance: str) -> None:
    """The scales stay, codes do not leave their range, and small moves stay within a step."""
    weight = weights("normal")
    grid = freeze(weight, name, importances(importance))
    moved = quantize_on(weight + 1e-3, grid)
    assert not torch.equal(moved, quantize_on(weight, grid))
    assert (moved - weight).abs().mean() < 0.02
    far = quantize_on(100 * weight, grid)
    assert far.abs().max() < 2 * weight.abs().max()


def test_elsewhere_the_library_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM, where compilers fuse: what comes is the library's, whatever our arithmetic says."""
    monkeypatch.setattr(formats, "FUSED", True)
    monkeypatch.setattr(formats, "_values", None)
    weight = weights("normal")
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        assert same_bits(quantize_dequantize(weight, name), library(weight, name, None))


def test_a_large_matrix_is_done_in_parts() -> None:
    weight = torch.randn(1500, 256, generator=torch.Generator().manual_seed(1))
    for name in ("Q4_0", "IQ4_NL", "Q4_K"):
        wanted = library(weight, name, None)
        assert same_bits(quantize_dequantize(weight, name), wanted)
        assert same_values(quantize_on(weight, freeze(weight, name)), wanted)


def test_a_transposed_weight() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).t()
    wanted = library(weight.contiguous(), "Q4_1", None)
    assert same_bits(quantize_dequantize(weight, "Q4_1"), wanted)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("Q4_9", torch.zeros(1, 256), "no number format 'Q4_9'"),
        ("Q4_K", torch.zeros(1, 96), "blocks of 256"),
        ("Q4_0", torch.zeros(1, 256).half(), "float32"),
        ("int4-b32", torch.zeros(256), "float32 matrix"),
    ],
)
def test_what_cannot_be(name: str, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_dequantize(weight, name)
    with pytest.raises(ValueError, match=message):
        freeze(weight, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("importance", ["none", "uneven"])
@pytest.mark.parametrize("name", [*NAMES, "int4-b32", "int8-b128-asym"])
def test_on_a_gpu(name: str, importance: str) -> None:
    weight, given = weights("normal"), importances(importance)
    wanted = quantize_dequantize(weight, name, given)
    there = None if given is None else given.cuda()
    assert same_bits(quantize_dequantize(weight.cuda(), name, there).cpu(), wanted)
    grid: Grid = freeze(weight.cuda(), name, there)
    assert same_values(quantize_on(weight.cuda(), grid).cpu(), wanted)
