"""What a student is taught by: the teacher's text, another model's probabilities, preferences.

Each is a sum over a part of a batch (see training/packing.py), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from edgedistill.errors import ArtifactError
from edgedistill.targets import Targets
from edgedistill.training.data import TrainingRow
from edgedistill.training.head import nll_of, token_losses
from edgedistill.training.learner import Loss, Packer
from edgedistill.training.packing import Part, hidden_states, pack

FLOOR = 1e-9  # of a bucket's mass: nothing of it is left where rounding takes the rest


def sparse_kl(ids: Tensor, logprobs: Tensor, logits: Tensor) -> Tensor:
    """KL(target || student) [c] over k tokens and one bucket for all others.

    ids [c, k] (-1: none), logprobs [c, k] of the target in nats, logits [c, vocabulary]. Without
    the bucket the student is taught that nothing but the k tokens exists (arXiv 2503.16870).
    """
    there = ids >= 0
    wanted = torch.where(there, logprobs.float(), -torch.inf)
    given = logits.log_softmax(-1).gather(1, ids.clamp(min=0))
    p, q = wanted.exp(), torch.where(there, given.exp(), 0.0)
    inside = (p * torch.where(there, wanted.clamp(min=-100) - given, 0.0)).sum(1)
    p_rest, q_rest = (1 - p.sum(1)).clamp(min=0), (1 - q.sum(1)).clamp(min=FLOOR)
    rest = torch.xlogy(p_rest, p_rest) - p_rest * q_rest.log()
    return inside + rest


def with_targets(kl_weight: float) -> Loss:
    """NLL of the teacher's text + kl_weight x KL from another model's probabilities, where they are
    known. Without the NLL a student of a few tokens' probabilities repeats itself."""

    def loss(model: Any, part: Part) -> Tensor:
        labels, known, share = part["labels"], part["target_known"], part["target_weights"]

        def losses(logits: Tensor, chosen: slice) -> Tensor:
            nll = cross_entropy(logits, labels[chosen], reduction="none")
            apart = sparse_kl(part["target_ids"][chosen], part["target_logprobs"][chosen], logits)
            return nll + kl_weight * share[chosen] * torch.where(known[chosen], apart, 0.0)

        found = token_losses(model, hidden_states(model, part), losses)
        return (found * part["weights"]).sum()

    return loss


class TargetPacker(Packer):
    """Packs rows with what another model predicts at each of their supervised tokens, read from
    the file `targets` when a row's turn comes; `weighted`: see `row_weights`."""

    def __init__(self, targets: Path, weighted: bool, tokens: int, *share: Any) -> None:
        super().__init__(tokens, *share)
        self._targets = Targets(targets)
        found = self._targets.log_likelihood
        weights = row_weights(found) if weighted else np.ones_like(found)
        self._weights = dict(zip(self._targets.rows, weights.tolist(), strict=True))

    def pack(self, rows: Sequence[TrainingRow]) -> Part:
        found = [self._targets.row(row.id) for row in rows]
        for row, targets in zip(rows, found, strict=True):
            if len(targets.known) != len(row.answer):
                raise ArtifactError(
                    f"{row.id} has targets of {len(targets.known)} tokens and an answer of "
                    f"{len(row.answer)}",
                    where=str(self._targets.file),
                    hint="delete its folder; the next build makes it again",
                )
        weights = [self._weights[row.id] for row in rows for _ in row.answer]
        return {
            **pack(rows),
            "target_ids": torch.from_numpy(np.concatenate([each.ids for each in found])).long(),
            "target_logprobs": torch.from_numpy(np.concatenate([t.logprobs for t in found])),
            "target_known": torch.from_numpy(np.concatenate([each.known for each in found])),
            "target_weights": torch.tensor(weights),
        }


def row_weights(log_likelihood: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """sigmoid((x - mean) / standard deviation) of the log-likelihood a token [rows] that the other
    model gives to the teacher's answers: it teaches less where it knows less (Proxy-KD, arXiv
    2401.07013, eq. 7). A row whose likelihood is not known counts as one at the mean."""
    known = log_likelihood[np.isfinite(log_likelihood)].astype(np.float64)
    if not len(known):
        return np.full(len(log_likelihood), 0.5)
    apart = np.where(np.isfinite(log_likelihood), log_likelihood - known.mean(), 0.0)
    spread = known.std()
    return np.asarray(1 / (1 + np.exp(-apart / spread if spread > 0 else 0 * apart)))


@dataclass(frozen=True)
class Pair:
    """An answer to learn, and one that is worse: where there is none, the first is text alone.

    `reference` are the log-likelihoods of both under the model that the training begins with.
    """

    chosen: TrainingRow
    rejected: TrainingRow | None
    reference: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        return len(self.chosen) + (len(self.rejected) if self.rejected else 0)

    @property
    def supervised(self) -> int:
        return self.chosen.supervised

    @property
    def weight(self) -> float:
        return self.chosen.weight

    @property
    def units(self) -> int:
        return 1  # each pair counts alike, however long its answers are

    def unweighted(self) -> Pair:
        return replace(self, chosen=self.chosen.unweighted())


class PairPacker(Packer):
    """Packs the answers of pairs one behind the other."""

    def pack(self, rows: Sequence[Pair]) -> Part:
        both = [row for row in rows if row.rejected is not None]
        answers = [row.chosen for row in rows] + [r.rejected for r in both if r.rejected]
        chosen = [at for at, row in enumerate(rows) if row.rejected is not None]
        return {
            **pack(answers),
            "pairs": torch.tensor([row.chosen.weight for row in rows]),
            "chosen": torch.tensor(chosen, dtype=torch.long),
            "reference": torch.tensor([row.reference for row in both]).reshape(-1, 2),
        }


def preferring(beta: float) -> Loss:
    """Mean NLL of the better answer + DPO of it against the worse one, each pair by its weight.

    DPO (Rafailov et al. 2023, arXiv 2305.18290): -log sigmoid(beta x (how much likelier than under
    the reference the better answer became - how much the worse one did)).
    """

    def loss(model: Any, part: Part) -> Tensor:
        nll = token_losses(model, hidden_states(model, part), nll_of(part["labels"]))
        weights, count = part["pairs"], len(part["packing"]["lengths"])
        sums = nll.new_zeros(count).index_add(0, part["row"], nll)
        lengths = nll.new_zeros(count).index_add(0, part["row"], torch.ones_like(nll))
        better = (weights * (sums / lengths)[: len(weights)]).sum()
        chosen, reference = part["chosen"], part["reference"]
        gain = -sums[chosen] - reference[:, 0]
        other = -sums[len(weights) :] - reference[:, 1]
        return better - (weights[chosen] * logsigmoid(beta * (gain - other))).sum()

    return loss
