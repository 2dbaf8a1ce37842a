"""The models of a build behind one shape, so that each is measured in the same way."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgedistill.child import REQUEST_SECONDS
from edgedistill.fidelity import EvalRow, Floats, follows, nll, read_logits, record
from edgedistill.progress import Task
from edgedistill.prompting import StudentPrompt
from edgedistill.runtimes import Runtime, asked_ids, open_runtime

if TYPE_CHECKING:
    from edgedistill.torch_runtime import TorchModel


class Runs(Protocol):
    """A loaded model that is measured."""

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        """The greedy answer to each row's prompt, stripped."""

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        """Logits that predict each token of the teacher's answers, stop token included, as
        float32 rows in `into`."""


@dataclass(frozen=True)
class Recorded:
    """The number of rows of logits, and the IDs of those prompts where each token of the teacher's
    answer is the model's most likely one: its greedy answer is then the teacher's. `nll` is of the
    teacher's answers, in nats a token."""

    tokens: int
    followed: list[str]
    nll: float


@dataclass(frozen=True)
class Model:
    """A model of the chain by name, loaded only inside `with model.open() as runs`."""

    name: str  # as results.Agreement has it
    open: Callable[[], AbstractContextManager[Runs]]


@dataclass(frozen=True)
class TorchRuns:
    """A Hugging Face checkpoint in torch, fp32."""

    model: TorchModel
    prompt: StudentPrompt
    max_tokens: int

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        asked = [self.prompt.prompt_ids(row.prompt, row.history) for row in rows]
        made = self.model.generate(asked, self.max_tokens, self.prompt.stop_ids, task=task)
        return [self.prompt.decode(ids).strip() for ids in made]

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        losses, followed = [np.zeros(0)], []
        asked = [supervised(self.prompt, row) for row in rows]
        made = self.model.logits(asked)
        for row, (ids, first), logits in zip(rows, asked, made, strict=True):
            record([logits], into)
            losses.append(nll(logits, ids[first:]))
            if follows(logits.argmax(1).tolist(), ids[first:], self.max_tokens):
                followed.append(row.id)
            task.advance()
        return _recorded(losses, followed)


@dataclass(frozen=True)
class DeviceRuns:
    """A model in the device's runtime, with the model's own tokenizer."""

    model: Runtime
    prompt: StudentPrompt
    max_tokens: int

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        answers = []
        for row in rows:
            ids = asked_ids(self.model, self.prompt.render(row.prompt, row.history))
            made = self.model.generate(ids, self.max_tokens, self.prompt.stop_ids)
            answers.append(made.text.strip())
            task.advance()
        return answers

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        losses, followed = [np.zeros(0)], []
        for row in rows:
            ids, first = supervised(self.prompt, row)
            begin = into.stat().st_size if into.is_file() else 0
            likely = self.model.logits(ids, first, into)
            losses.append(nll(read_logits(into, len(likely), begin), ids[first:]))
            if follows(likely, ids[first:], self.max_tokens):
                followed.append(row.id)
            task.advance()
        return _recorded(losses, followed)


def _recorded(losses: Sequence[Floats], followed: list[str]) -> Recorded:
    every = np.concatenate(losses)
    return Recorded(len(every), followed, float(every.mean()) if len(every) else 0.0)


def supervised(prompt: StudentPrompt, row: EvalRow) -> tuple[list[int], int]:
    """Token IDs of prompt and teacher's answer, and the position where the answer starts."""
    asked = prompt.prompt_ids(row.prompt, row.history)
    return asked + prompt.answer_ids(row.answer), len(asked)


def torch_model(
    name: str,
    folder: Path,
    prompt: StudentPrompt,
    max_tokens: int,
    adapter: Path | None = None,
    values: Path | None = None,
) -> Model:
    """A checkpoint folder, with an adapter on top or without, or with the weights that a
    quantized model `values` of it holds, dequantized."""

    @contextlib.contextmanager
    def opened() -> Iterator[Runs]:
        from edgedistill.torch_runtime import TorchModel  # torch, only once it is needed

        model = TorchModel(folder, adapter, values)
        try:
            yield TorchRuns(model, prompt, max_tokens)
        finally:
            del model
            gc.collect()  # the next model must not find this one still in memory

    return Model(name, opened)


def device_model(
    name: str,
    kind: str,
    file: Path,
    prompt: StudentPrompt,
    max_tokens: int,
    *,
    threads: int | None,
    context_tokens: int,
    command: Sequence[str] | None = None,
    request_seconds: float = REQUEST_SECONDS,
) -> Model:
    """A GGUF file, or an ONNX model folder, in the runtime `kind`; `command` starts another child
    than this machine's (see LlamaCpp)."""

    @contextlib.contextmanager
    def opened() -> Iterator[Runs]:
        with open_runtime(
            kind,
            file,
            threads=threads,
            context_tokens=context_tokens,
            command=command,
            request_seconds=request_seconds,
        ) as model:
            yield DeviceRuns(model, prompt, max_tokens)

    return Model(name, opened)


def context_needed(prompt: StudentPrompt, rows: Sequence[EvalRow], max_tokens: int) -> int:
    """Context window in tokens that holds each row with the longest answer to it."""
    lengths = [(len(supervised(prompt, row)[0]), supervised(prompt, row)[1]) for row in rows]
    return max(max(whole, asked + max_tokens) for whole, asked in lengths)
