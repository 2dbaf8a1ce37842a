"""What a student is taught by: each loss against the formula, written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import STOP, tiny_student, tiny_targets
from training_rows import packed_loss, rows_of_lengths

from edgedistill.distill.losses import (
    Pair,
    PairPacker,
    TargetPacker,
    preferring,
    row_weights,
    sparse_kl,
    with_targets,
)
from edgedistill.errors import ArtifactError
from edgedistill.torch_runtime import load_model
from edgedistill.training.data import TrainingRow
from edgedistill.training.learner import Learner, backward

K = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("student")).folder


def written_out(ids: list[int], logprobs: list[float], logits: list[float]) -> float:
    """KL over the k tokens and a bucket of all others, term by term."""
    whole = sum(math.exp(x) for x in logits)
    student = {i: math.exp(logits[i]) / whole for i in ids if i >= 0}
    target = {i: math.exp(x) for i, x in zip(ids, logprobs, strict=True) if i >= 0}
    rest, student_rest = 1 - sum(target.values()), 1 - sum(student.values())
    found = sum(p * math.log(p / student[i]) for i, p in target.items())
    return found + (rest * math.log(rest / student_rest) if rest > 1e-12 else 0.0)


@pytest.mark.parametrize(
    ("ids", "shares"), [([4, 0, 2], [0.5, 0.3, 0.1]), ([1, 3, -1], [0.6, 0.2, 0.0])]
)
def test_sparse_kl_is_the_formula_with_a_bucket(ids: list[int], shares: list[float]) -> None:
    logits = [0.3, -1.2, 2.0, 0.0, 0.9]
    logprobs = [math.log(p) if p else -math.inf for p in shares]
    found = sparse_kl(torch.tensor([ids]), torch.tensor([logprobs]), torch.tensor([logits]))
    assert float(found) == pytest.approx(written_out(ids, logprobs, logits), abs=1e-5)


def test_sparse_kl_is_zero_at_the_target_and_finite_where_it_is_certain() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0, 0.9]], requires_grad=True)
    top = logits.detach().log_softmax(-1).topk(K)
    at_target = sparse_kl(top.indices, top.values, logits.detach())
    assert float(at_target) == pytest.approx(0, abs=1e-6)
    certain = sparse_kl(torch.tensor([[2, -1]]), torch.tensor([[0.0, -torch.inf]]), logits)
    certain.sum().backward()
    assert torch.isfinite(certain).all()
    assert torch.isfinite(logits.grad).all()


def test_without_the_bucket_the_rest_would_be_free() -> None:
    """Two students alike on the listed tokens differ by nothing else than the bucket."""
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])
    other = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    even, wrong = sparse_kl(ids.repeat(2, 1), logprobs.repeat(2, 1), other).tolist()
    assert even == pytest.approx(0, abs=1e-6)
    assert wrong > 0.5


def test_loss_with_targets_is_nll_and_weighted_kl(folder: Path, tmp_path: Path) -> None:
    rows, model = rows_of_lengths(9, 14), load_model(folder)
    file = tiny_targets(tmp_path / "t.safetensors", rows, [-1.0, -3.0])
    packer = TargetPacker(file, True, 4096)
    (part,) = packer([rows])["parts"]
    batch = {"parts": [part], "total": 8}
    found = float(backward(Learner(model, with_targets(0.7)), batch, lambda loss: None, "fp32"))
    nll = float(packed_loss(load_model(folder), rows))
    kl = 0.0
    for row, weight in zip(rows, row_weights(np.float32([-1, -3])).tolist(), strict=True):
        ids = torch.tensor([[*row.prompt, *row.answer]])
        logits = model(ids).logits[0, len(row.prompt) - 1 : -1].detach()
        at = [i for i, r in enumerate(part["row"].tolist()) if rows[r] is row]
        apart = sparse_kl(part["target_ids"][at], part["target_logprobs"][at], logits)
        kl += weight * float(apart[1:].sum())
    assert found == pytest.approx(nll + 0.7 * kl / 8, rel=1e-4)


def test_row_weights() -> None:
    """sigmoid of the standard score; a row at the mean, or without a likelihood, counts half."""
    found = row_weights(np.float32([-1, -3, -2, np.nan]))
    score = 1 / math.sqrt(2 / 3)
    wanted = [1 / (1 + math.exp(-score)), 1 / (1 + math.exp(score)), 0.5, 0.5]
    assert found.tolist() == pytest.approx(wanted)
    assert row_weights(np.float32([-2, -2])).tolist() == [0.5, 0.5]
    assert row_weights(np.float32([np.nan])).tolist() == [0.5]


def test_targets_of_another_answer_are_refused(tmp_path: Path) -> None:
    rows = rows_of_lengths(9)
    file = tiny_targets(tmp_path / "t.safetensors", rows, [-1.0])
    longer = [TrainingRow(rows[0].id, rows[0].prompt, (5, *rows[0].answer))]
    with pytest.raises(ArtifactError, match="targets of 4 tokens and an answer of 5"):
        TargetPacker(file, False, 4096)([longer])


def likelihood(model: Any, row: TrainingRow) -> torch.Tensor:
    ids = torch.tensor([[*row.prompt, *row.answer]])
    logits = model(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(row.answer)[:, None]).sum()


def pairs_of(references: list[tuple[float, float]]) -> list[Pair]:
    rows = rows_of_lengths(9, 12, 15)
    worse = [TrainingRow(row.id, row.prompt, (7, 9, 11, 13, STOP)) for row in rows]
    made = [Pair(r, w, ref) for r, w, ref in zip(rows, worse, references, strict=False)]
    return [*made, *(Pair(row, None) for row in rows[len(made) :])]


def test_loss_of_pairs_is_mean_nll_and_dpo(folder: Path) -> None:
    model, pairs = load_model(folder), pairs_of([(-9.0, -4.0), (-2.0, -8.0)])
    batch = PairPacker(4096)([pairs])
    loss = backward(Learner(model, preferring(0.2)), batch, lambda loss: None, "fp32")
    total = 0.0
    for pair in pairs:
        chosen = float(likelihood(model, pair.chosen).detach())
        total -= chosen / len(pair.chosen.answer)
        if pair.rejected is not None:
            rejected = float(likelihood(model, pair.rejected).detach())
            margin = 0.2 * (chosen - pair.reference[0] - (rejected - pair.reference[1]))
            total += math.log1p(math.exp(-margin))
    assert float(loss) == pytest.approx(total / len(pairs), rel=1e-4)


def test_parts_of_pairs_give_the_same_loss_as_one(folder: Path) -> None:
    pairs, found = pairs_of([(-9.0, -4.0), (-2.0, -8.0), (-5.0, -5.0)]), []
    for tokens in (4096, 16):
        model = load_model(folder)
        batch = PairPacker(tokens)([pairs])
        loss = backward(Learner(model, preferring(0.2)), batch, lambda x: x.backward(), "fp32")
        found.append((float(loss), float(model.get_input_embeddings().weight.grad.norm())))
    assert len(PairPacker(16)([pairs])["parts"]) > 1
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_step_prefers_the_better_answer(folder: Path) -> None:
    """The better one becomes likelier and the worse one less so: DPO's gradient has its sign."""
    model = load_model(folder)
    (pair, *_) = pairs_of([(0.0, 0.0)])
    with torch.no_grad():
        before = [float(likelihood(model, r)) for r in (pair.chosen, pair.rejected) if r]
    held = Pair(pair.chosen, pair.rejected, (before[0], before[1]))
    batch = PairPacker(4096)([[held]])
    backward(Learner(model, preferring(1.0)), batch, lambda loss: loss.backward(), "fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
        after = [float(likelihood(model, r)) for r in (pair.chosen, pair.rejected) if r]
    assert after[0] > before[0]
    assert after[1] < before[1]
