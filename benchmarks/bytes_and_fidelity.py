"""Every candidate of a target on held-out prompts and on a general text, side by side.

    python benchmarks/bytes_and_fidelity.py RECIPE TARGET.yaml --text BOOK.txt [--workspace DIR]
        [--also NAME=MODEL ...] [--elsewhere PROMPTS.jsonl]

MODEL is a peer's GGUF file or ONNX model folder of the same merged student. Candidates that
`edgedistill quantize` has not made yet are made first. Prints JSON: for each file its bytes;
agreement with the teacher (95 % bootstrap interval), KLD to the exported f16 and NLL of the
teacher's answers on held-out prompts; KLD, top-1 and bits per byte on the text; with
PROMPTS of another job, KLD to the exported file's own answers there and how many are the same;
decode and prefill tokens/s of all files in turn. Formats were chosen on validation prompts: nothing
here chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import machine
from edgedistill.artifacts import digest_of
from edgedistill.bench.agreement import agreement, judge
from edgedistill.bench.models import DeviceRuns, context_needed, supervised
from edgedistill.checks import make_checker
from edgedistill.errors import GateFailed
from edgedistill.fidelity import (
    EvalRow,
    kl_divergence,
    nll,
    read_logits,
    read_rows,
    shuffled,
    summarise,
)
from edgedistill.pipeline import Workspace, build
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.runtimes import LLAMA, ONNX, Opened, Runtime, open_runtime, size_of
from edgedistill.student import KEPT_TOKENS
from edgedistill.target import load_target

CHUNKS, CHUNK = 24, 160  # of the general text: token count of each, by the whole vocabulary
CONTEXT = 512
ELSEWHERE = 60  # prompts of another job


@dataclass(frozen=True)
class File:
    """A model file with the folder of its tokenizer."""

    name: str
    file: Path
    folder: Path

    def open(self, needed: int = 0) -> Opened:
        """In its runtime, with room for `needed` tokens: an ONNX model is a folder."""
        kind = ONNX if self.file.is_dir() else LLAMA
        return open_runtime(kind, self.file, context_tokens=max(CONTEXT, needed))

    @property
    def kept(self) -> list[int] | None:
        found = self.folder / KEPT_TOKENS
        return json.loads(found.read_text("utf-8")) if found.is_file() else None


def main() -> None:
    arguments = _arguments()
    recipe = load_recipe(arguments.recipe)
    workspace = Workspace(arguments.workspace, arguments.workspace / "dist")
    exported, files, dataset = _made(recipe, arguments.target, workspace)
    chunks = _chunks(arguments.text, exported, recipe)
    measuring = _Measuring(recipe, exported, dataset, chunks, _prompts(arguments.elsewhere))
    files += [_peer(word, exported) for word in arguments.also]
    rows = [measuring.row(file) for file in [exported, *files]]
    if arguments.rounds:
        for row, rates in zip(rows, _rates([exported, *files], arguments.rounds), strict=True):
            row |= rates
    result = {"machine": machine.facts(), "recipe": recipe.name, "rows": rows}
    print(json.dumps(result, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a general text, UTF-8")
    parser.add_argument("--workspace", type=Path, default=Path(".edgedistill"))
    parser.add_argument("--also", action="append", default=[], metavar="NAME=MODEL")
    parser.add_argument("--elsewhere", type=Path, help="prompts.jsonl of another job")
    parser.add_argument("--rounds", type=int, default=3, help="of speed, every file in turn; 0: no")
    return parser.parse_args()


def _made(recipe: Recipe, target: Path, workspace: Workspace) -> tuple[File, list[File], Path]:
    """The exported file, every candidate of the target, and the dataset's folder."""
    made = _Folders()
    try:
        build(recipe, [load_target(target)], workspace, made, until="quantize")
    except GateFailed as error:
        print(f"no candidate is inside the gates, all are measured: {error.what}", file=sys.stderr)
    files = [_model(folder) for folder in made.all["candidate"]]
    names = [*load_target(target).formats, *(a.name for a in load_target(target).allocations)]
    named = [File(name, file, folder) for name, (file, folder) in zip(names, files, strict=True)]
    file, folder = _model(made.all["export"][0])
    return File("exported", file, folder), named, made.all["curate"][0]


class _Folders(Silent):
    """Remembers the folder of every stage."""

    def __init__(self) -> None:
        self.all: dict[str, list[Path]] = {}

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self.all.setdefault(name, []).append(folder)
        print(f"{name}: {folder.name}{' (reused)' if reused else ''}", file=sys.stderr)


def _model(folder: Path) -> tuple[Path, Path]:
    facts = json.loads((folder / "manifest.json").read_text("utf-8"))["facts"]
    return folder / facts["file"], folder


def _peer(word: str, exported: File) -> File:
    name, _, path = word.partition("=")
    return File(name, Path(path), exported.folder)


def _chunks(text: Path, exported: File, recipe: Recipe) -> list[str]:
    """Pieces of the text, spread over it."""
    shown = StudentPrompt(exported.folder, recipe.student)
    ids = shown.encode(text.read_text("utf-8"))
    step = max(CHUNK, len(ids) // CHUNKS)
    return [shown.decode(ids[at : at + CHUNK]) for at in range(0, len(ids) - CHUNK, step)][:CHUNKS]


def _prompts(file: Path | None) -> list[EvalRow]:
    """Some prompts of another job; what the exported file answers is filled in later."""
    if file is None:
        return []
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    chosen = sorted(lines, key=lambda line: shuffled(line["id"], 0))[:ELSEWHERE]
    return [EvalRow(line["id"], line["prompt"], "", "", seen=False) for line in chosen]


class _Measuring:
    """What every file is measured with; the exported file first, as the others' reference."""

    def __init__(
        self,
        recipe: Recipe,
        exported: File,
        dataset: Path,
        chunks: list[str],
        elsewhere: list[EvalRow],
    ) -> None:
        self._elsewhere = elsewhere
        self._recipe, self._exported, self._chunks = recipe, exported, chunks
        self._rows = read_rows(dataset / "held_out.jsonl")
        self._checker = make_checker(recipe.check)
        self._whole = StudentPrompt(exported.folder, recipe.student)
        self._scratch = tempfile.TemporaryDirectory()
        self._reference: dict[str, Any] = {}

    def row(self, file: File) -> dict[str, Any]:
        print(f"measure {file.name}", file=sys.stderr)
        shown = StudentPrompt(file.folder, self._recipe.student)
        most, every = self._recipe.student.max_tokens, [*self._rows, *self._elsewhere]
        with file.open(context_needed(shown, every, most)) as model:
            runs = DeviceRuns(model, shown, self._recipe.student.max_tokens)
            task = Silent().task("", None)
            texts = runs.answer(self._rows, task)
            mix = [(row.id, *supervised(shown, row)) for row in self._rows]
            on_mix = self._compared(model, file, mix, self._whole_ids())
            text = [(str(i), shown.encode(t), 1) for i, t in enumerate(self._chunks)]
            whole = {str(i): self._whole.encode(t) for i, t in enumerate(self._chunks)}
            on_text = self._compared(model, file, text, whole)
            size = sum(len(chunk.encode()) for chunk in self._chunks)
            far = self._far(model, file, runs) if self._elsewhere else None
        answers = {row.id: text for row, text in zip(self._rows, texts, strict=True)}
        same = judge(self._checker, self._rows, answers)
        share = agreement(file.name, self._rows, same, 2000, 0)
        return {
            "name": file.name,
            "bytes": size_of(file.file),
            "agreement": asdict(share.overall),
            "agreement_seen": share.seen and share.seen.value,
            "agreement_unseen": share.unseen and share.unseen.value,
            "held_out": on_mix,
            "elsewhere": far,
            "text": {**on_text, "bits_per_byte": on_text["nats"] / np.log(2) / size},
        }

    def _far(self, model: Runtime, file: File, runs: DeviceRuns) -> dict[str, Any]:
        """The other job: what the exported file answers is the reference."""
        made = runs.answer(self._elsewhere, Silent().task("", None))
        if file is self._exported:
            pairs = zip(self._elsewhere, made, strict=True)
            self._elsewhere = [replace(row, answer=text) for row, text in pairs]
        shown = StudentPrompt(file.folder, self._recipe.student)
        asked = [(f"far-{row.id}", *supervised(shown, row)) for row in self._elsewhere]
        whole = {f"far-{row.id}": supervised(self._whole, row)[0] for row in self._elsewhere}
        pairs = zip(self._elsewhere, made, strict=True)
        same = sum(text == row.answer for row, text in pairs) / len(made)
        return {**self._compared(model, file, asked, whole), "same_answer": same}

    def _whole_ids(self) -> dict[str, list[int]]:
        return {row.id: supervised(self._whole, row)[0] for row in self._rows}

    def _compared(
        self,
        model: Runtime,
        file: File,
        asked: Sequence[tuple[str, list[int], int]],
        whole: dict[str, list[int]],
    ) -> dict[str, Any]:
        """KLD and top-1 against the exported file where tokens are the same, NLL of all."""
        klds, tops, losses = [], [], []
        kept = file.kept
        for name, ids, first in asked:
            path = Path(self._scratch.name) / "row.f32"
            path.unlink(missing_ok=True)
            count = len(model.logits(ids, first, path))
            logits = read_logits(path, count)
            losses.append(nll(logits, ids[first:]))
            if file is self._exported:
                path.rename(self._kept_row(name))
            if (ids if kept is None else [kept[i] for i in ids]) == whole[name]:
                before = read_logits(self._kept_row(name), count)
                before = before if kept is None else before[:, kept]
                klds.append(kl_divergence(before, logits))
                tops.append(before.argmax(1) == logits.argmax(1))
        every = np.concatenate(losses)
        found = summarise(np.concatenate(klds), np.concatenate(tops)) if klds else None
        return {
            "nats_per_token": float(every.mean()),
            "nats": float(every.sum()),
            "compared": len(klds),
            "of": len(asked),
            **(asdict(found) if found else {}),
        }

    def _kept_row(self, name: str) -> Path:
        return Path(self._scratch.name) / f"exported-{digest_of(name)[:16]}.f32"  # IDs are any text


def _rates(files: Sequence[File], rounds: int) -> list[dict[str, Any]]:
    """pp512 and tg128, all files in turn, so that a machine that slows down favours none."""
    found: list[dict[str, list[float]]] = [{"pp": [], "tg": []} for _ in files]
    for _ in range(rounds):
        for file, rates in zip(files, found, strict=True):
            with file.open() as model:
                made = model.bench(512, 128, 1)
            rates["pp"] += made["pp"]
            rates["tg"] += made["tg"]
    return [
        {f"{test}_tokens_per_second": statistics.median(rates[test]) for test in rates}
        for rates in found
    ]


if __name__ == "__main__":
    main()
