"""What one step of fitting does: quantized forward, teacher's text, the unquantized student."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, kl_div

from edgedistill.allocations import FitSpec
from edgedistill.artifacts import Allocation
from edgedistill.fit.general import general_rows
from edgedistill.fit.latent import Latent, types_by_parameter
from edgedistill.importance import read_importance
from edgedistill.progress import Progress
from edgedistill.tensors import read_layout
from edgedistill.torch_runtime import device, load_model
from edgedistill.training.data import IGNORED, PART_TOKENS, TrainingRow, split_batch
from edgedistill.training.loss import in_parts, supervised_head, supervised_logits


class Teaching:
    """The models of one fitting: the frozen, unquantized reference and the one that is fitted."""

    def __init__(
        self,
        checkpoint: Path,
        reference: Path,
        allocation: Allocation,
        spec: FitSpec,
        precision: str,
    ) -> None:
        self._folder, self._allocation, self._spec = checkpoint, allocation, spec
        self._precision = precision
        self._reference = load_model(reference).to(device()).eval().requires_grad_(False)
        self._reference.config.use_cache = False

    def general(self, count: int, progress: Progress) -> list[TrainingRow]:
        """Text that the reference writes."""
        if not count:
            return []
        config = json.loads((self._folder / "tokenizer_config.json").read_text("utf-8"))
        begin = self._reference.config.bos_token_id if config.get("add_bos_token") else None
        with progress.task("write general text", count, "texts") as task:
            return general_rows(self._reference, count, begin, self._spec.seed, task)

    def build(self) -> Latent:
        """The trained weights, at their start."""
        model = load_model(self._folder).to(device())
        model.config.use_cache = False
        types = types_by_parameter(self._folder, self._allocation.types)
        rank = self._spec.rank if self._spec.method == "lora" else None
        return Latent(model, types, rank, self._spec.seed, self._importance())

    def _importance(self) -> dict[str, Any]:
        """By the checkpoint's parameter names."""
        if self._allocation.importance is None:
            return {}
        found = read_importance(self._allocation.importance)
        return {
            tensor.source: torch.from_numpy(found.mean(tensor.name)).to(device())
            for tensor in read_layout(self._folder).tensors
            if tensor.name in found.sums
        }

    def backward(
        self, latent: Latent, batch: Mapping[str, Any], run_backward: Callable[[Any], None]
    ) -> Any:
        """The gradient of one batch; its mean loss a token."""
        latent.refresh()
        total = in_parts(
            batch, self._precision, run_backward, lambda part: self._loss(latent, part)
        )
        latent.collect()
        return total

    def _loss(self, latent: Latent, part: Mapping[str, Any]) -> Any:
        """Sum over the supervised tokens of NLL (teacher's text only) + weight x KL, in nats. The
        gradient is also that of weight x the hidden states' error for each of these tokens."""
        states, last = _hidden(latent.model, part)
        logits, labels = supervised_head(latent.model, last, part)
        answered = ~_is_general(part)
        loss = cross_entropy(logits[answered], labels[answered], reduction="sum")
        if not self._spec.compares:
            return loss
        with torch.no_grad():
            wanted_states, wanted_last = _hidden(self._reference, part)
        if self._spec.kl_weight:
            with torch.no_grad():
                wanted = supervised_head(self._reference, wanted_last, part)[0].log_softmax(-1)
            told = kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
            loss = loss + self._spec.kl_weight * told
        if self._spec.hidden_weight:
            apart = hidden_error(states, wanted_states, _token_weights(part))
            apart = self._spec.hidden_weight * apart
            loss = loss + (apart - apart.detach())  # what is told stays in nats
        return loss

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def nll(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
        """Nats a token of the teacher's text under a model as it computes now."""
        total, count = 0.0, 0
        for part in _parts(batches):
            logits, labels = supervised_logits(model, part)
            total += float(cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return total / count

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def kld(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
        """KL(unquantized student || a model as it computes now), nats a token of the answers."""
        total, count = 0.0, 0
        for part in _parts(batches):
            given = supervised_logits(model, part)[0].log_softmax(-1)
            wanted = supervised_logits(self._reference, part)[0].log_softmax(-1)
            total += float(kl_div(given, wanted, reduction="sum", log_target=True))
            count += len(given)
        return total / count

    def keep(self, latent: Latent, folder: Path) -> None:
        """Write the latent weights as `model.safetensors`; the model computes quantized again
        from its next refresh on."""
        latent.expose()
        tied = latent.model.config.tie_word_embeddings
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in latent.model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _parts(batches: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What goes through a model at once, as in training: logits of a large vocabulary are large."""
    where = device()
    for batch in batches:
        moved = {name: tensor.to(where) for name, tensor in batch.items()}
        yield from split_batch(moved, PART_TOKENS[where.type])


def hidden_error(
    given: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], weights: torch.Tensor
) -> torch.Tensor:
    """Squared error of hidden states [rows, longest, width] as a share of the wanted ones' square:
    the mean over layers of the sum over tokens, by their `weights` [rows, longest].

    A student that lacks layers is compared behind the last one only. Predictions tell something of
    the answer's tokens; this tells as much of each token of the prompt and of each layer (hidden
    states as a teacher: Jiao et al. 2020, TinyBERT, arXiv 1909.10351; for rounding: Li et al. 2021,
    BRECQ, arXiv 2102.05426).
    """
    if len(given) != len(wanted):
        given, wanted = given[-1:], wanted[-1:]
    compared, sums = weights > 0, []
    for mine, theirs in zip(given, wanted, strict=True):
        own, other = mine[compared].float(), theirs[compared].float()
        shares = (own - other).square().sum(-1) / other.square().sum(-1)
        sums.append((shares * weights[compared]).sum())
    return torch.stack(sums).mean()


def _hidden(model: Any, part: Mapping[str, Any]) -> tuple[Sequence[Any], Any]:
    """[rows, longest, width] behind each layer, the last one normalised; the last one."""
    decoder = model.get_decoder()
    made = decoder(input_ids=part["input_ids"], use_cache=False, output_hidden_states=True)
    last = made.last_hidden_state
    return (*made.hidden_states[1:-1], last), last


def _token_weights(part: Mapping[str, Any]) -> Any:
    """How much each token's hidden states count [rows, longest]. Those of a row count alike, and
    in all as much as it has supervised tokens, however the batch is cut into parts.

    All count that are no padding and lead to a supervised one, but the first: attention rests on
    it for want of another (Xiao et al. 2024, arXiv 2309.17453), so its states are large and the
    same in every row.
    """
    kept = part["labels"] != IGNORED
    at = torch.arange(kept.shape[1], device=kept.device)
    last = (kept * at).max(1).values
    compared = (at > 0) & (at < last[:, None])
    return compared * (kept.sum(1) / compared.sum(1).clamp(min=1))[:, None]


def _is_general(part: Mapping[str, Any]) -> Any:
    """Whether each supervised token is of a text that no teacher answered: [n]."""
    kept = part["labels"][:, 1:] != IGNORED
    return part["general"][:, None].expand_as(kept)[kept]
