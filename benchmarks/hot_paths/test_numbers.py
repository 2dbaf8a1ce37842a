"""What a training or an export does to each matrix, row or file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.fit.allocation import solve
from edgedistill.fit.formats import fake_quantize, freeze, quantize_on
from edgedistill.gguf_header import read_header
from edgedistill.number_formats import stored_bytes
from edgedistill.training.data import TrainingRow
from edgedistill.training.packing import pack

SHAPES = {"135M": (576, 1536), "0.5B": (896, 4864)}  # the widest matrix of a student's layer
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q8_0")
LAYERS, TOKENS = 30, 49_152
MATRICES = {"attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576),
            "attn_output": (576, 576), "ffn_gate": (1536, 576), "ffn_up": (1536, 576),
            "ffn_down": (576, 1536)}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _weight(student: str) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(SHAPES[student], generator=drawn) * 0.02


@pytest.mark.parametrize("student", SHAPES)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_fake_quantize(benchmark: Any, kind: str, student: str) -> None:
    """A matrix rounded to a format whose scales are found anew, and a gradient back."""
    weight = _weight(student).requires_grad_()
    given = torch.ones_like(weight)

    def both_ways() -> torch.Tensor:
        weight.grad = None
        made = fake_quantize(weight, kind)
        made.backward(given)
        return made

    assert not torch.equal(benchmark(both_ways), weight)
    assert weight.grad is not None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_quantize_on(benchmark: Any, kind: str) -> None:
    """The same with the scales that were found once: what each step of a fitting does."""
    weight = _weight("0.5B")
    grid = freeze(weight, kind)
    assert benchmark(quantize_on, weight, grid).shape == weight.shape


def test_pack(benchmark: Any) -> None:
    """64 rows of 100 to 300 tokens, one behind the other."""
    draw = random.Random(0)
    sizes = [(draw.randint(80, 200), draw.randint(20, 100)) for _ in range(64)]
    rows = [
        TrainingRow(f"r{number}", tuple(range(prompt)), tuple(range(answer)))
        for number, (prompt, answer) in enumerate(sizes)
    ]
    assert benchmark(pack, rows)["input_ids"].shape[1] == sum(map(len, rows))


def test_allocation(benchmark: Any) -> None:
    """A number format for each of 211 matrices, within a budget of bytes."""
    shapes = {f"blk.{n}.{name}": at for n in range(LAYERS) for name, at in MATRICES.items()}
    shapes["token_embd"] = (TOKENS, 576)
    sizes = {n: {kind: stored_bytes(*at, kind) for kind in KINDS} for n, at in shapes.items()}
    draw = random.Random(0)
    costs = {
        name: {kind: draw.random() / size for kind, size in by_kind.items()}
        for name, by_kind in sizes.items()
    }
    smallest = sum(min(by_kind.values()) for by_kind in sizes.values())
    budget = round(1.3 * smallest)
    chosen = benchmark(solve, sizes, costs, budget)
    assert smallest < sum(sizes[name][kind] for name, kind in chosen.items()) <= budget


def test_gguf_header(benchmark: Any, tmp_path: Path) -> None:
    """272 tensors and a vocabulary of 49,152 with its merges."""
    file = _gguf(tmp_path / "model.gguf")
    assert len(benchmark(read_header, file).tensors) == 272


def _gguf(file: Path) -> Path:
    """A student's header; the tensors themselves are small."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list([f"token{n}" for n in range(TOKENS)])
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges([f"t{n} en" for n in range(TOKENS)])
    for number in range(272):
        writer.add_tensor(f"blk.{number}.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
