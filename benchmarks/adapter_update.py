"""An update of a bundle: its size, the time to apply it, and whether the answers are the new
bundle's.

    python benchmarks/adapter_update.py OLD_BUNDLE NEW_BUNDLE HELD_OUT.jsonl [--prompts 40]
        [--rounds 5] [--threads N]

OLD_BUNDLE and NEW_BUNDLE are folders in dist/ (NEW may be what `edgedistill adapt` made);
HELD_OUT.jsonl is a dataset's held-out part (a finished curate-* folder of the workspace). The
update is made once and applied to fresh copies of the old bundle; one warm-up, not counted. Both
bundles, the full new one and the updated old one, then answer the same prompts. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from edgedistill import machine, update
from edgedistill.artifacts import digest_of_file
from edgedistill.fidelity import EvalRow, read_rows, shuffled
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp
from edgedistill.student import read_tokenizer_keys, write_tokenizer


def main() -> None:
    arguments = _arguments()
    old, new = update.read_bundle(arguments.old), update.read_bundle(arguments.new)
    rows = sorted(read_rows(arguments.held_out), key=lambda row: shuffled(row.id, 0))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        file = Path(scratch) / "update.edup"
        made = update.make(arguments.old, arguments.new, file, update.ask, 8)
        seconds, held = [], Path(scratch) / "held"
        for _ in range(arguments.rounds + 1):
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(arguments.old, held)
            started = time.perf_counter()
            update.apply(held, file)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        shutil.rmtree(held)
        shutil.copytree(arguments.old, held)
        checked = update.apply(held, file, compare=update.compare)
        with_check = time.perf_counter() - started
        asked = rows[: arguments.prompts]
        answers = [_answers(folder, asked, arguments) for folder in (arguments.new, held)]
        before = _answers(arguments.old, asked, arguments)
        same_files = _files(arguments.new) == _files(held)
    result = {
        "old_model_bytes": (old.folder / old.facts["model"]).stat().st_size,
        "new_model_bytes": (new.folder / new.facts["model"]).stat().st_size,
        "new_adapter": new.facts.get("adapter"),
        "update_bytes": made.bytes,
        "files": {"kept": made.kept, "added": made.added, "patched": made.patched},
        "apply_seconds": _spread(seconds[1:]),
        "apply_with_check_seconds": with_check,
        "samples_same": [checked.same, checked.samples],
        "files_equal_to_the_full_bundle": same_files,
        "prompts": len(asked),
        "answers_equal_to_the_full_bundle": _share(*answers),
        "answers_equal_to_the_old_bundle": _share(answers[1], before),
        "machine": machine.facts(),
    }
    print(json.dumps(result, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--scratch", type=Path, help="where copies go; by default the system's")
    return parser.parse_args()


def _answers(folder: Path, rows: list[EvalRow], arguments: argparse.Namespace) -> list[list[int]]:
    bundle = update.read_bundle(folder)
    model, adapter = folder / bundle.facts["model"], bundle.facts.get("adapter")
    spec = StudentSpec(**bundle.manifest["spec"]["recipe"]["student"])
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(Path(tokenizer), read_tokenizer_keys(model))
        shown = StudentPrompt(Path(tokenizer), spec)
        asked = [shown.prompt_ids(row.prompt, row.history) for row in rows]
    with LlamaCpp(
        model, threads=arguments.threads, adapter=None if adapter is None else folder / adapter
    ) as runtime:
        return [runtime.generate(ids, spec.max_tokens, shown.stop_ids).ids for ids in asked]


def _share(first: list[list[int]], second: list[list[int]]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def _files(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of_file(path) for path in paths}


def _spread(values: Any) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
