"""The hand-over check of an export: does the GGUF file behave as the merged checkpoint does?

What breaks exports in practice is looked at first and by name (tokenizer, chat template, stop
token, vocabulary), then the weights, by value and by KL divergence on real prompts and answers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Exported,
    Identity,
    run_stage,
    tool_versions,
)
from edgedistill.errors import DatasetError, GateFailed, RuntimeFailure
from edgedistill.families import is_own
from edgedistill.fidelity import EvalRow, Kld, compare, read_rows, record
from edgedistill.handover import KLD_ROWS, chosen_rows, conversations, difference
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import LLAMA, Runtime, asked_ids
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.tensors import Tensor, read_layout, read_plain_tensors

NAMED_TENSORS = 3
TOKENS_KEY, TEMPLATE_KEY = "tokenizer.ggml.tokens", "tokenizer.chat_template"
EOS_KEY = "tokenizer.ggml.eos_token_id"
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Difference:
    """One tensor whose values are not the checkpoint's; `relative` is the root mean square of the
    difference over that of the values."""

    name: str
    relative: float

    def __str__(self) -> str:
        return f"{self.name} (off by {self.relative:.0%})" if self.relative >= 0.01 else self.name


def verify(
    checkpoint: Checkpoint,
    exported: Exported,
    dataset: Dataset,
    prompt: StudentSpec,
    max_mean_kld: float,
    out: Path,
    progress: Progress,
) -> None:
    """Stage "verify"; its manifest's facts hold the figures.

    Raises:
        GateFailed: step "export"; the message names exactly what differs.
    """
    identity = Identity(
        stage="verify",
        version=1,
        spec={
            "max_mean_kld": max_mean_kld,
            "rows": KLD_ROWS,
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            "exported": exported.digest,
            "dataset": dataset.digest,
        },
        tools=tool_versions("llama-cpp-python", "torch", "transformers", "tokenizers"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        student = StudentPrompt(checkpoint.folder, prompt)
        task = Handover(checkpoint.folder, exported.model, student, progress)
        validation = read_rows(dataset.folder / "validation.jsonl")
        held_out = read_rows(dataset.folder / "held_out.jsonl")
        return task.check([*validation, *held_out], validation, max_mean_kld, folder)

    run_stage(identity, out, progress, work)


@dataclass(frozen=True)
class Handover:
    """One export held against its checkpoint; what a check finds raises GateFailed by name."""

    checkpoint: Path
    model: Path
    student: StudentPrompt
    progress: Progress
    runtime: str = LLAMA

    def check(
        self,
        rows: Sequence[EvalRow],
        validation: Sequence[EvalRow],
        max_mean_kld: float,
        folder: Path,
    ) -> Mapping[str, Any]:
        if not validation:
            raise DatasetError("there are no validation rows to check the export on")
        chosen = chosen_rows(validation)
        file = _open(self.model)
        self._same_keys({name: file.fields[name].contents() for name in _tokenizer_keys(file)})
        self._same_vocabulary(file)
        before, after = folder / "merged.f32", folder / "exported.f32"
        try:
            with LlamaCpp(self.model, context_tokens=self.longest(rows)) as runtime:
                self.same_stop(runtime)
                compared = self.same_tokens(runtime, rows)
                for row in chosen:
                    runtime.logits(*self.supervised(row), after)
        except RuntimeFailure as error:
            self.fail(f"llama.cpp cannot use the exported file: {error.what}", error)
        own = is_own(self.checkpoint)
        different = self._different_tensors(file) if own else []
        also = {} if own else self._converted_tensors(file)
        kld = self.kld(chosen, before, after)
        before.unlink()
        after.unlink()
        self._same_weights(kld, max_mean_kld, different)
        return {**asdict(kld), "rows": len(chosen), "texts_compared": compared, **also}

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        """Raise GateFailed for the step "export"."""
        raise GateFailed("export", what, where=str(self.model)) from cause

    # Files

    def _same_keys(self, found: Mapping[str, Any]) -> None:
        """Every `tokenizer.*` key of the file is the student's, and training used those."""
        entries = json.loads((self.checkpoint / TOKENIZER_GGUF).read_text("utf-8"))
        wanted = {entry["key"]: entry["value"] for entry in entries if entry["value"] != []}
        # Small keys first: a wrong tokenizer type explains more than the first odd token.
        for key in sorted(wanted.keys() | found.keys(), key=lambda key: _is_long(wanted.get(key))):
            if wanted.get(key) != found.get(key):
                what = difference(wanted.get(key), found.get(key))
                self.fail(f"{key} differs in the exported file: {what}")
        config = json.loads((self.checkpoint / TOKENIZER_CONFIG).read_text("utf-8"))
        if found.get(TEMPLATE_KEY) != config.get("chat_template"):
            what = difference(config.get("chat_template"), found.get(TEMPLATE_KEY))
            self.fail(f"the chat template is not the one training used: {what}")
        if found.get(EOS_KEY) not in self.student.stop_ids:
            self.fail(
                f"{EOS_KEY} is {found.get(EOS_KEY)}, but training taught the student to stop with "
                f"{sorted(self.student.stop_ids)}"
            )

    def _same_vocabulary(self, file: Any) -> None:
        tokens = len(file.fields[TOKENS_KEY].data)
        embedding = next(t for t in file.tensors if t.name == EMBEDDING)
        for what, count in (
            (f"rows in {EMBEDDING}", embedding.data.shape[0]),
            ("tokens in the tokenizer that training used", self.student.vocab_size),
        ):
            if count != tokens:
                self.fail(f"{TOKENS_KEY} has {tokens} tokens, but there are {count} {what}")

    def _different_tensors(self, file: Any) -> list[Difference]:
        """Tensors whose stored values are not exactly the checkpoint's, worst first."""
        stored = {tensor.name: tensor.data for tensor in file.tensors}
        layout = read_layout(self.checkpoint)
        missing = stored.keys() ^ {tensor.name for tensor in layout.tensors}
        if missing:
            self.fail(f"the tensors {', '.join(sorted(missing))} are in one of the two only")
        found = []
        with self.progress.task("compare tensors", len(layout.tensors), "tensors") as task:
            for tensor in layout.tensors:
                relative = _relative_difference(tensor, stored[tensor.name])
                if relative:
                    found.append(Difference(tensor.name, relative))
                task.advance()
        return sorted(found, key=lambda difference: -difference.relative)

    def _converted_tensors(self, file: Any) -> dict[str, int]:
        """How many tensors llama.cpp's converter stored as they are. It may reorder others, which
        the KL divergence judges, but token embeddings it must not touch."""
        stored = {tensor.name: tensor for tensor in file.tensors}
        architecture = str(file.fields["general.architecture"].contents())
        equal = set()
        for tensor in read_plain_tensors(self.checkpoint, architecture):
            kept = stored.get(tensor.name)
            if kept is None:
                continue
            wanted = replace(tensor, dtype=kept.data.dtype.type)
            if _relative_difference(wanted, kept.data) == 0:
                equal.add(tensor.name)
        if EMBEDDING not in equal:
            self.fail(f"these tensors do not hold the checkpoint's values: {EMBEDDING}")
        self.progress.note(
            f"{len(equal)} of {len(stored)} tensors are the checkpoint's, value by value; "
            "llama.cpp's converter reordered the others, and only KL divergence judges them"
        )
        return {"tensors_equal": len(equal), "tensors": len(stored)}

    # The running model

    def same_stop(self, runtime: Runtime) -> None:
        """The runtime stops where training taught the student to."""
        missing = self.student.stop_ids - runtime.end_ids()
        if missing or runtime.facts["eos"] not in self.student.stop_ids:
            self.fail(
                f"training taught the student to stop with {sorted(self.student.stop_ids)}, but "
                f"{self.runtime}'s EOS is {runtime.facts['eos']} and it stops at "
                f"{sorted(runtime.end_ids())}"
            )

    def same_tokens(self, runtime: Runtime, rows: Sequence[EvalRow]) -> int:
        """Runtime and training tokenizer give the same IDs; the number of texts compared."""
        compared = 0
        with self.progress.task("compare tokens", len(rows), "prompts") as task:
            for label, text, wanted in self._texts(rows):
                prompted = label.startswith("prompt")
                found = asked_ids(runtime, text) if prompted else runtime.tokenize(text)
                if found != wanted:
                    self.fail(f"token IDs of {label} differ: {difference(wanted, found)}")
                compared += 1
                task.advance(0.5)
        return compared

    def _texts(self, rows: Sequence[EvalRow]) -> Iterator[tuple[str, str, list[int]]]:
        for row in rows:
            rendered = self.student.render(row.prompt, row.history)
            yield f"prompt {row.id}", rendered, self.student.prompt_ids(row.prompt, row.history)
            answer = self.student.answer_ids(row.answer)[:-1]  # without the stop token
            if row.answer:
                yield f"answer {row.id}", row.answer, answer
        for label, talk, asks in conversations():
            rendered = self.student.render_messages(talk, add_generation_prompt=asks)
            yield label, rendered, self.student.encode(rendered)

    # Weights

    def supervised(self, row: EvalRow) -> tuple[list[int], int]:
        """Token IDs of prompt and answer, and where the answer begins."""
        asked = self.student.prompt_ids(row.prompt, row.history)
        return asked + self.student.answer_ids(row.answer), len(asked)

    def longest(self, rows: Sequence[EvalRow]) -> int:
        """A context in tokens that holds each of the rows."""
        return max(len(self.supervised(row)[0]) for row in rows) + 8

    def kld(self, rows: Sequence[EvalRow], before: Path, after: Path) -> Kld:
        """KLD of the checkpoint, recorded here into `before`, to the logits in `after`."""
        from edgedistill.torch_runtime import TorchModel

        model = TorchModel(self.checkpoint)
        with self.progress.task("logits of merged", len(rows), "prompts") as task:
            for logits in model.logits([self.supervised(row) for row in rows]):
                record([logits], before)
                task.advance()
        del model
        gc.collect()
        return compare(before, after, self.student.vocab_size)

    def _same_weights(self, kld: Kld, bound: float, different: Sequence[Difference]) -> None:
        named = ", ".join(str(difference) for difference in different[:NAMED_TENSORS])
        more = f" and {len(different) - NAMED_TENSORS} more" if len(different) > 3 else ""
        if not kld.mean_kld <= bound:
            blamed = (
                f"; not the checkpoint's values: {named}{more}"
                if different
                else "; every tensor holds the checkpoint's values: look at the hyperparameters"
            )
            self.fail(
                f"mean KLD of merged to exported is {kld.mean_kld:.3g}, above the bound of "
                f"{bound:g} (over {kld.tokens} answer tokens){blamed}"
            )
        if different:
            self.fail(f"these tensors do not hold the checkpoint's values: {named}{more}")


def _open(model: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(model)
    except (ValueError, OSError, IndexError) as error:
        raise GateFailed(
            "export", f"not a readable GGUF file: {error}", where=str(model)
        ) from error


def _tokenizer_keys(file: Any) -> list[str]:
    return [name for name in file.fields if name.startswith("tokenizer.")]


def _relative_difference(tensor: Tensor, stored: Any) -> float:
    """0 when equal bit by bit; infinite when the shapes differ."""
    if tuple(stored.shape) != tensor.shape or stored.dtype != tensor.dtype:
        return float("inf")
    squares, total, start = 0.0, 0.0, 0
    for block in tensor.blocks():
        own = stored[start : start + len(block)]
        start += len(block)
        if not np.array_equal(own, block):
            squares += float(np.square(own.astype(np.float64) - block).sum())
        total += float(np.square(block.astype(np.float64)).sum())
    return (squares / total) ** 0.5 if total else float(squares > 0)


def _is_long(value: Any) -> bool:
    return isinstance(value, list)
