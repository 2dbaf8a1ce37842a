"""A model that benchmarks ask: a GGUF file or an ONNX folder in its runtime, each in a child
process, or a checkpoint in torch. All three look the same from here.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedistill import machine
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.fidelity import NOT_FINITE, nll
from edgedistill.model_prompt import (
    GENAI_CONFIG,
    MANIFEST,
    Asked,
    asked_model,
    context_limit,
    model_facts,
)
from edgedistill.places import kind_of
from edgedistill.prompting import ENDS_OF_TURN, TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.prompting import load_tokenizer as read_tokenizer
from edgedistill.recipe import StudentSpec
from edgedistill.runtimes import Opened, asked_ids, open_runtime
from edgedistill.tensors import read_layout
from edgedistill.weights.folder import digest_of_folder, weight_files

TORCH = "torch"
CHECKPOINT = "config.json"
CONTEXT_TOKENS = 2048  # where nobody says: five examples of MMLU take 700
LOGIT_BYTES = 256 << 20  # of rows on the disk at once
ROWS = 64  # of these in memory at once
PIECE = 64  # tokens that torch writes before it is looked whether a stop text is there
Message = Mapping[str, str]


@dataclass(frozen=True)
class Subject:
    """A model file or folder, and what runs it: llama.cpp, onnxruntime-genai or torch. `asked` is
    None for a checkpoint."""

    file: Path
    kind: str
    asked: Asked | None = None

    def facts(self) -> dict[str, Any]:
        """What a result says of it; of a checkpoint the sha256 is over what shapes its answers."""
        if self.asked is not None:
            return {**model_facts(self.asked), "runtime": self.kind}
        return {
            "name": self.file.name,
            "file": self.file.name,
            "sha256": digest_of_folder(self.file),
            "bytes": sum((self.file / name).stat().st_size for name in weight_files(self.file)),
            "types": {},
            "bundle": None,
            "runtime": self.kind,
        }

    def learnt_tokens(self) -> int | None:
        """The longest context that it has learnt, where it says."""
        if self.asked is not None:
            return context_limit(self.asked.file)
        found = _json(self.file / CHECKPOINT).get("max_position_embeddings")
        return found if isinstance(found, int) else None


def find_subject(path: Path) -> Subject:
    """The model that `path` names: a GGUF file, an ONNX folder, a bundle, or a checkpoint.

    Raises:
        ArtifactError: it is none of these, or not there.
    """
    known = (MANIFEST, GENAI_CONFIG, CHECKPOINT)
    if not path.is_file() and not any((path / name).is_file() for name in known):
        what = "there is no model in this folder" if path.is_dir() else "there is no such file"
        hint = "give a GGUF file, an ONNX model folder, a bundle (dist/...), or a checkpoint folder"
        raise ArtifactError(what, where=str(path), hint=hint)
    if (path / CHECKPOINT).is_file() and not (path / GENAI_CONFIG).is_file():
        return Subject(path, TORCH)
    asked = asked_model(path, None, None, None)
    return Subject(asked.file, kind_of(asked.file), asked)


class Model(Protocol):
    """A loaded model that benchmarks ask. `context_tokens` is the room for a request and its
    answer, `prefix` the token that stands before a text of which nothing comes before."""

    parameters: int
    context_tokens: int
    prefix: int

    def tokens(self, text: str) -> list[int]:
        """Token IDs of a text; special tokens in it are parsed, none is added."""

    def encode(self, text: str) -> list[int]:
        """As `tokens`, with a BOS in front where the model wants one, as an app does it."""

    def likelihood(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        """Log-likelihood in nats of `ids[first:]` behind `ids[:first]`, and whether each of them is
        the most likely token there. `first` is at least 1."""

    def generate(self, ids: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        """The greedy answer, up to an end token or to one of the texts `stops`."""

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation by the model's own chat template; a last message of the assistant is left
        open, for the model to go on.

        Raises:
            WeightsError: it has no chat template that can be used.
        """


@contextlib.contextmanager
def open_model(subject: Subject, context: int | None, threads: int | None) -> Iterator[Model]:
    """Load it, with room for `context` tokens: by default CONTEXT_TOKENS, or all it has learnt
    where that is less.

    Raises:
        RuntimeFailure, ArtifactError: it is damaged, or its runtime refuses it. MissingTool: that
            runtime is not installed. UsageError: it has not learnt so long a context.
    """
    learnt = subject.learnt_tokens()
    if context is not None and learnt is not None and context > learnt:
        raise UsageError(
            f"--context {context} is beyond the {learnt} tokens that this model has learnt",
            where=str(subject.file),
        )
    room = context or min(CONTEXT_TOKENS, learnt or CONTEXT_TOKENS)
    if subject.kind == TORCH:
        yield TorchCheckpoint(subject.file, room)
        return
    with (
        open_runtime(
            subject.kind, subject.file, threads=threads or machine.threads(), context_tokens=room
        ) as runtime,
        tempfile.TemporaryDirectory(prefix="edgedistill-") as folder,
    ):
        yield DeviceModel(subject, runtime, room, Path(folder) / "logits")


class DeviceModel:
    """A file in the runtime that ships. `scratch` is where a request's logits go."""

    def __init__(self, subject: Subject, runtime: Opened, room: int, scratch: Path) -> None:
        self._subject, self._runtime, self._scratch = subject, runtime, scratch
        facts = runtime.facts
        self.parameters: int = facts["parameters"]
        self.context_tokens = min(room, facts["n_ctx"])
        self.prefix: int = facts["bos"] if facts["bos"] >= 0 else facts["eos"]
        self._ends = runtime.end_ids()
        self._rows = max(1, LOGIT_BYTES // (4 * facts["n_vocab"]))
        self._prompt: StudentPrompt | None = None

    def tokens(self, text: str) -> list[int]:
        return self._runtime.tokenize(text) if text else []

    def encode(self, text: str) -> list[int]:
        return asked_ids(self._runtime, text)

    def likelihood(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        given, total, greedy = list(ids), 0.0, True
        for start in range(first, len(given), self._rows):
            part = given[start : start + self._rows]
            try:
                likely = self._runtime.logits([*given[:start], *part], start, self._scratch)
                total -= self._nll(part)
            finally:
                self._scratch.unlink(missing_ok=True)
            greedy = greedy and likely == part
        return total, greedy

    def _nll(self, part: Sequence[int]) -> float:
        """Of the rows in `scratch`, a few at once: a row takes a megabyte while it is summed."""
        total, width = 0.0, self._runtime.facts["n_vocab"]
        for start in range(0, len(part), ROWS):
            some = part[start : start + ROWS]
            count, begin = len(some) * width, 4 * start * width
            rows = np.fromfile(self._scratch, np.float32, count, offset=begin).reshape(-1, width)
            total += _finite(nll(rows, some), self._subject.file)
        return total

    def generate(self, ids: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        made = self._runtime.generate(list(ids), max_tokens, self._ends, stop_texts=stops)
        return cut(made.text, stops)

    def render(self, messages: Sequence[Message]) -> str:
        if self._prompt is None:
            assert self._subject.asked is not None  # a checkpoint is no DeviceModel
            self._prompt = self._subject.asked.prompt()
        return _rendered(self._prompt, messages)


class TorchCheckpoint:
    """A checkpoint folder in torch, fp32: what a device's file is held against."""

    def __init__(self, folder: Path, room: int) -> None:
        from edgedistill.torch_runtime import TorchModel

        self._folder, self.context_tokens = folder, room
        self._tokenizer = read_tokenizer(folder / TOKENIZER)
        config = _json(folder / TOKENIZER_CONFIG)
        self._bos = self._id(config.get("bos_token"))
        self._adds_bos = bool(config.get("add_bos_token")) and self._bos is not None
        ends = {self._id(name) for name in (config.get("eos_token"), *ENDS_OF_TURN)}
        self._ends = frozenset(each for each in ends if each is not None)
        if not self._ends:
            raise ArtifactError("its tokenizer has no end-of-sequence token", where=str(folder))
        self.prefix = self._bos if self._bos is not None else min(self._ends)
        self.parameters = read_layout(folder).parameters
        self._model = TorchModel(folder)
        self._prompt: StudentPrompt | None = None
        self._held: tuple[list[int], Any] = ([], None)

    def _id(self, name: Any) -> int | None:
        text = name.get("content") if isinstance(name, dict) else name
        return self._tokenizer.token_to_id(text) if isinstance(text, str) else None

    def tokens(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        ids = self.tokens(text)
        wanted = self._adds_bos and ids[:1] != [self._bos]
        return [self.prefix, *ids] if wanted else ids

    def likelihood(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        before, answer = list(ids[: first - 1]), list(ids[first:])
        if before != self._held[0]:  # the answers to one question share its cache
            self._held = (before, self._model.read_once(before) if before else None)
        rows = self._model.behind(self._held[1], ids[first - 1 : -1])
        return -_finite(nll(rows, answer), self._folder), rows.argmax(1).tolist() == answer

    def generate(self, ids: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        made: list[int] = []
        while len(made) < max_tokens:
            piece = min(PIECE if stops else max_tokens, max_tokens - len(made))
            more = self._model.generate([[*ids, *made]], piece, self._ends)[0]
            made += more
            text = str(self._tokenizer.decode(made, skip_special_tokens=False))
            if len(more) < piece or any(stop in text for stop in stops):
                break
        return cut(str(self._tokenizer.decode(made, skip_special_tokens=False)), stops)

    def render(self, messages: Sequence[Message]) -> str:
        if self._prompt is None:
            self._prompt = StudentPrompt(self._folder, StudentSpec(weights=str(self._folder)))
        return _rendered(self._prompt, messages)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _rendered(prompt: StudentPrompt, messages: Sequence[Message]) -> str:
    before, begun = _begun(messages)
    return prompt.render_messages(before, add_generation_prompt=True) + begun


def _begun(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """A conversation, and the answer that is begun at its end."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


def _finite(found: Any, where: Path) -> float:
    """The sum; a logit that is not finite would otherwise be a score like any other."""
    if (found >= NOT_FINITE).any():
        raise ArtifactError("the model gives logits that are not finite", where=str(where))
    return float(found.sum())


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"it cannot be read: {error}", where=str(file)) from error
