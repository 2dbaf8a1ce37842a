"""What a model on the way says: answers drawn at random, how likely it finds given ones, and which
tokens it finds likeliest."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.distill.lesson import Job
from edgedistill.distill.model import asked_model
from edgedistill.fidelity import EvalRow
from edgedistill.memory import give_back
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.torch_runtime import (
    BATCH,
    deterministic,
    device,
    generate,
    read_once,
    repeated,
    sample,
    shared_tokens,
)
from edgedistill.training.data import CHUNK_BYTES, PART_TOKENS, TrainingRow
from edgedistill.training.head import head_logits, nll_of, token_losses
from edgedistill.training.learner import Learner, nll_loss
from edgedistill.training.loss import autocast
from edgedistill.training.packing import hidden_states, moved, pack, packed_attention, split

# Of rows that are read together, what they share counted in each: a cache holds it for each.
CACHED_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class Predicted:
    """What a model predicts at the n answer tokens of a row: its k likeliest tokens, `ids` int64
    [n, k] with `logprobs` float32 [n, k], and `own` float32 [n], those of the tokens themselves."""

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    own: npt.NDArray[np.float32]


@contextlib.contextmanager
def asked(job: Job) -> Iterator[Learner]:
    """The model that a job begins with, in memory for as long as it is asked."""
    deterministic(job.spec.seed)  # as in training, whose process may be another one
    made = Learner(asked_model(job.student.folder, job.spec, job.start), nll_loss).to(device())
    try:
        yield made.eval()
    finally:
        del made.model  # what is trained next needs the memory
        gc.collect()
        give_back()
        if device().type == "cuda":
            torch.cuda.empty_cache()


def draw(
    job: Job,
    rows: Sequence[EvalRow],
    samples: int,
    temperature: float,
    seed: str,
    kept: Path,
    progress: Progress,
    cut: str | None = None,
) -> list[list[str]]:
    """`samples` answers to each row, drawn at `temperature` (0: the likeliest), cleaned; `cut` in
    place of one that max_tokens cuts off. Every batch has a seed of its own and a line in the file
    `kept`, so that a run which was cut off draws the rest alone."""
    shown = job.shown()
    asked_ids = [shown.prompt_ids(row.prompt, row.history) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(asked_ids[i]))
    todo = [i for i in order for _ in range(samples)]
    batches = [todo[at : at + BATCH] for at in range(0, len(todo), BATCH)]
    done = _kept_lines(kept)
    if len(done) < len(batches):
        with (
            asked(job) as learner,
            kept.open("ab") as stream,
            progress.task(f"{job.label}: answers of its own", len(todo), "answers") as task,
        ):
            task.advance(sum(map(len, done)))
            for number in range(len(done), len(batches)):
                prompts = [asked_ids[i] for i in batches[number]]
                with autocast(learner.plain.device, job.spec.precision):
                    given = learner.plain, prompts, job.prompt.max_tokens, shown.stop_ids
                    made = (
                        sample(*given, temperature, _seed(seed, number))
                        if temperature
                        else generate(*given)
                    )
                done.append([_text(ids, job, shown, cut) for ids in made])
                _keep_line(stream, done[-1])
                task.advance(len(prompts))
    answers: list[list[str]] = [[] for _ in rows]
    for batch, texts in zip(batches, done, strict=True):
        for index, text in zip(batch, texts, strict=True):
            answers[index].append(text)
    return answers


def _text(ids: Sequence[int], job: Job, shown: StudentPrompt, cut: str | None) -> str:
    if cut is not None and len(ids) >= job.prompt.max_tokens:
        return cut
    return job.cleaned(shown.decode(ids))


def _seed(name: str, batch: int) -> int:
    """Of 63 bits: torch takes no more."""
    return int.from_bytes(hashlib.sha256(f"{name}:{batch}".encode()).digest()[:8], "big") >> 1


def _keep_line(stream: Any, texts: list[str]) -> None:
    stream.write((json.dumps(texts) + "\n").encode())
    stream.flush()
    os.fsync(stream.fileno())


def _kept_lines(file: Path) -> list[list[str]]:
    """The whole lines of a file that a kill may have torn; the rest is cut off."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("rb+") as stream:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def log_likelihoods(learner: Learner, rows: Sequence[TrainingRow], precision: str) -> list[float]:
    """Of the whole answer of each row, in nats."""
    found: list[float] = []
    for part, packed in _parts(learner, rows):
        with _computing(learner, precision):
            nll = token_losses(
                learner.plain, hidden_states(learner.plain, packed), nll_of(packed["labels"])
            )
        sums = nll.new_zeros(len(part)).index_add(0, packed["row"], nll)
        found += (-sums).tolist()
    return found


def predictions(
    learner: Learner, rows: Sequence[TrainingRow], k: int, precision: str
) -> Iterator[Predicted]:
    """Of each row in turn; the predictions of a part of them at most are in memory. What all
    prompts begin with, such as a long system prompt, goes through the model once."""
    begin, where = shared_tokens([row.prompt for row in rows]), next(learner.parameters()).device
    states = (
        _behind(learner, rows, begin, precision) if begin else _packed(learner, rows, precision)
    )
    for part, hidden, labels in states:
        with torch.no_grad(), autocast(where, precision):
            found = _likeliest(learner.plain, hidden, labels, k)
        ids, logprobs, own = (tensor.cpu().numpy() for tensor in found)
        at = 0
        for row in part:
            chosen = slice(at, at + len(row.answer))
            yield Predicted(ids[chosen], logprobs[chosen], own[chosen])
            at = chosen.stop


def _packed(
    learner: Learner, rows: Sequence[TrainingRow], precision: str
) -> Iterator[tuple[list[TrainingRow], Tensor, Tensor]]:
    """Rows, with hidden states [s, width] where they predict their answers' tokens, labels [s]."""
    for part, packed in _parts(learner, rows):
        with _computing(learner, precision):
            hidden = hidden_states(learner.plain, packed)
        yield part, hidden, packed["labels"]


def _behind(
    learner: Learner, rows: Sequence[TrainingRow], begin: int, precision: str
) -> Iterator[tuple[list[TrainingRow], Tensor, Tensor]]:
    """The same of rows whose first `begin` tokens are alike, from their keys and values."""
    where, decoder = next(learner.parameters()).device, learner.plain.get_decoder()
    with autocast(where, precision):
        cache = read_once(learner.plain, rows[0].prompt[:begin])
    for part in split(rows, CACHED_TOKENS[where.type]):
        rests = [[*row.prompt, *row.answer][begin:] for row in part]
        longest = max(map(len, rests))
        # Padding is on the right, where a causal model never looks.
        ids = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=where)
        own = repeated(cache, len(part))
        with torch.no_grad(), autocast(where, precision):
            found = decoder(input_ids=ids, past_key_values=own, use_cache=True).last_hidden_state
        ends = [(len(row.prompt) - begin - 1, len(row) - begin - 1) for row in part]
        hidden = torch.cat([found[i, first:last] for i, (first, last) in enumerate(ends)])
        labels = torch.tensor([token for row in part for token in row.answer], device=where)
        yield part, hidden, labels


def _likeliest(model: Any, hidden: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """IDs and log-probabilities [s, k], and log-probabilities [s] of labels [s], of hidden states
    [s, width]."""
    size = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    ids, logprobs, own = [], [], []
    for start in range(0, len(hidden), size):
        chosen = slice(start, start + size)
        every = head_logits(model, hidden[chosen]).log_softmax(-1)
        top = every.topk(min(k, every.shape[1]))
        ids.append(top.indices)
        logprobs.append(top.values)
        own.append(every.gather(1, labels[chosen, None])[:, 0])
    return torch.cat(ids), torch.cat(logprobs), torch.cat(own)


def _parts(
    learner: Learner, rows: Sequence[TrainingRow]
) -> Iterator[tuple[list[TrainingRow], dict[str, Any]]]:
    where = next(learner.parameters()).device
    for part in split(rows, PART_TOKENS[where.type]):
        yield part, moved(pack(part), where)


@contextlib.contextmanager
def _computing(learner: Learner, precision: str) -> Iterator[None]:
    where = next(learner.parameters()).device
    with torch.no_grad(), packed_attention(learner.plain), autocast(where, precision):
        yield
