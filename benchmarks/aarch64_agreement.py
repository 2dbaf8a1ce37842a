"""The same GGUF files on this machine's kernels and on emulated aarch64 ones.

    python benchmarks/aarch64_agreement.py FILE.gguf... --recipe RECIPE \\
        --held-out .edgedistill/curate-KEY/held_out.jsonl \\
        [--rows 24] [--device phone] [--threads 2] [--keep FOLDER]

For each file, on held-out rows that are chosen by ID alone: agreement with the teacher on both
processors and what became of it prompt by prompt, KLD and top-1 of the emulated processor against
this one, and which kernels it took. `--keep` holds what is done, row by row, so that a killed run
goes on. Prints JSON. Nothing is timed: an emulator's speed says nothing about a device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill import emulator, machine
from edgedistill.artifacts import digest_of, digest_of_file
from edgedistill.bench.agreement import agreement, answer_all, judge
from edgedistill.bench.emulated import choose, measure_emulated
from edgedistill.bench.models import Model, context_needed, device_model
from edgedistill.checks import make_checker
from edgedistill.errors import EdgedistillError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.library import find
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import BenchSpec, Recipe, load_recipe
from edgedistill.runtime import CHILD, LlamaCpp
from edgedistill.student import read_tokenizer_keys, write_tokenizer


class Told(Silent):
    """Says on stderr what takes long; stdout is for the result."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def main() -> None:
    given = _arguments()
    progress = Told()
    try:
        recipe = load_recipe(find("recipe", given.recipe))
        progress.note("aarch64: compiling llama.cpp takes ten minutes the first time")
        child = emulator.prepare_aarch64(given.device, progress)
        rows = choose(read_rows(given.held_out), BenchSpec(emulated_prompts=given.rows))
        with tempfile.TemporaryDirectory() as scratch:
            keep = given.keep or Path(scratch)
            (keep / "tokenizer").mkdir(parents=True, exist_ok=True)
            files = [_measured(file, given, recipe, rows, child, keep) for file in given.files]
    except EdgedistillError as error:
        raise SystemExit(str(error)) from error
    result = {
        "recipe": recipe.name,
        "check": recipe.check.kind,
        "held_out": digest_of_file(given.held_out),
        "rows": len(rows),
        "device": given.device,
        "processor": asdict(child.processor),
        "threads": given.threads,
        "files": files,
        "machine": machine.facts(),
    }
    print(json.dumps(result, indent=2, ensure_ascii=False))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--recipe", default="support-sql")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--device", choices=sorted(emulator.PROCESSORS), default="phone")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--keep", type=Path)
    return parser.parse_args()


def _measured(
    file: Path,
    given: argparse.Namespace,
    recipe: Recipe,
    rows: list[EvalRow],
    child: emulator.Emulator,
    keep: Path,
) -> dict[str, Any]:
    # Each file's own: a vocabulary may be trimmed.
    write_tokenizer(keep / "tokenizer", read_tokenizer_keys(file))
    prompt = StudentPrompt(keep / "tokenizer", recipe.student)
    context = max(512, context_needed(prompt, rows, recipe.student.max_tokens))
    sha256, held_out = digest_of_file(file), digest_of_file(given.held_out)
    # Kept figures belong to one file, one processor, one set of prompts and one way to ask them.
    asked = recipe.student.model_dump(mode="json", exclude={"weights"})
    key = digest_of([sha256, held_out, asked, emulator.identity(given.device), given.threads])
    folder = keep / key[:16]

    def model(name: str, command: tuple[str, ...]) -> Model:
        return device_model(
            name, "llama.cpp", file, prompt, recipe.student.max_tokens, threads=given.threads,
            context_tokens=context, command=command, request_seconds=emulator.REQUEST_SECONDS,
        )  # fmt: skip

    here, there = model("host", CHILD), model("aarch64", child.command)
    found = measure_emulated(here, there, rows, folder, Rows())
    # By the number of rows: what was kept for fewer is not an answer to all of these.
    answers = answer_all([here], rows, {}, folder / str(len(rows)), Silent())["host"]
    checker = make_checker(recipe.check)
    same = {"host": judge(checker, rows, answers), "aarch64": judge(checker, rows, found.answers)}
    shares = {name: asdict(agreement(name, rows, f, 2000, 0)) for name, f in same.items()}
    changed = [row.id for row in rows if answers[row.id] != found.answers[row.id]]
    return {
        "file": file.name,
        "sha256": sha256,
        "bytes": file.stat().st_size,
        "kernels": _kernels(file, child),
        "agreement": {name: shares[name]["overall"] for name in shares},
        "lost": [r.id for r in rows if same["host"][r.id] and not same["aarch64"][r.id]],
        "gained": [r.id for r in rows if same["aarch64"][r.id] and not same["host"][r.id]],
        "other_answer": changed,
        "aarch64_against_host": asdict(found.kld),
    }


class Rows(Told):
    """Says on stderr that a row is done: each takes half a minute and more."""

    def task(self, label: str, total: float | None, unit: str = "") -> Any:
        return _Row(total)


class _Row:
    def __init__(self, total: float | None) -> None:
        self.total, self.done = total, 0.0

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.done += amount
        print(f"{self.done:g} of {self.total} rows on aarch64", file=sys.stderr)

    def __enter__(self) -> _Row:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _kernels(file: Path, child: emulator.Emulator) -> dict[str, Any]:
    """What llama.cpp says of the instructions it uses and of the buffers its weights are in."""
    with LlamaCpp(
        file, threads=1, command=child.command, request_seconds=emulator.REQUEST_SECONDS
    ) as model:
        buffers = [line.split(":", 1)[-1].strip() for line in model.facts["buffers"].splitlines()]
        return {"instructions": model.facts["kernels"], "buffers": buffers}


if __name__ == "__main__":
    main()
