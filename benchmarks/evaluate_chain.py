"""Does a benchmark give the shipped files the score of the checkpoint that they were made of?

    python benchmarks/evaluate_chain.py CHECKPOINT HELD_OUT.jsonl BANKING77 [--work DIR]

CHECKPOINT is a finished `merge-*` folder of a workspace, HELD_OUT.jsonl the held-out prompts it was
trained for, BANKING77 the folder of that data set (test.csv, categories.json). Two local task files
are written: `intents`, which of 4 labels a customer's question has (the likelihood of each label),
and `answers`, the teacher's answer to held-out prompts, letter by letter (written by the model, by
its own chat template). The checkpoint in torch, its GGUF files and its ONNX models are asked both
through lm-evaluation-harness. Prints JSON: of each file and task the score with its standard error,
how many verdicts differ from the checkpoint's, and McNemar's test of the difference. Needs the
extra `evaluate`. A killed run goes on with --work.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.console import Plain
from edgedistill.evaluate import Plan, evaluate
from edgedistill.evaluate.evaluation import Evaluation, TaskResult, write_evaluation
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.onnx_builder import build_onnx
from edgedistill.paired import compare
from edgedistill.progress import Progress, Silent
from edgedistill.runtime import quantize_file
from edgedistill.student import TOKENIZER_GGUF

GGUF, ONNX = ("Q8_0", "Q4_0"), ("fp32", "int8-b32", "int4-b32")
QUESTIONS, ANSWERS, CHOICES, SEED = 200, 60, 4, 0
MAIN = {"intents": "acc", "answers": "exact_match"}
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
INTENTS = {
    "task": "intents",
    "output_type": "multiple_choice",
    "doc_to_text": "A customer of a bank writes: {{question}}\nWhat it is about:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def main() -> None:
    arguments = _arguments()
    with _folder(arguments.work) as work:
        progress = Plain(lambda line: print(line, file=sys.stderr))
        files = made(arguments.checkpoint, work)
        intents = write_task(work, INTENTS, questions(arguments.banking77))
        answers = write_task(work, TEXTS, texts(arguments.held_out))
        found = {
            name: asked(file, intents, answers, arguments.system, work, progress)
            for name, file in files.items()
        }
        for name, evaluations in found.items():
            for each in evaluations:
                write_evaluation(each, work / f"{name}-{each.tasks[0].name}.json")
    rows = [row for name in files for row in compared(name, found[name], found["checkpoint"])]
    print(json.dumps({"machine": machine.facts(), "rows": rows}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("--system", help="the student's system message, as its recipe has it")
    parser.add_argument("--work", type=Path, help="keep files and answers here")
    return parser.parse_args()


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def made(checkpoint: Path, work: Path) -> dict[str, Path]:
    """The checkpoint and every file of it; those that are there are not made again."""
    files = {"checkpoint": checkpoint, "F16": work / "F16.gguf"}
    if not files["F16"].is_file():
        origin = Provenance("chain", "checkpoint", "unknown", "")
        write_gguf(checkpoint, checkpoint / TOKENIZER_GGUF, files["F16"], origin, Silent())
    for type in GGUF:
        files[type] = work / f"{type}.gguf"
        if not files[type].is_file():
            quantize_file(files["F16"], files[type], type)
    for format in ONNX:
        files[f"onnx-{format}"] = work / f"onnx-{format}"
        if not files[f"onnx-{format}"].is_dir():
            build_onnx(checkpoint, files[f"onnx-{format}"], format)
    return files


def questions(folder: Path) -> list[dict[str, Any]]:
    """Customers' questions, each with its label among three others."""
    chance = random.Random(SEED)
    labels = json.loads((folder / "categories.json").read_text("utf-8"))
    with (folder / "test.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = []
    for row in chance.sample(rows, QUESTIONS):
        others = [label for label in labels if label != row["category"]]
        choices = [row["category"], *chance.sample(others, CHOICES - 1)]
        chance.shuffle(choices)
        shown = [label.replace("_", " ").lower() for label in choices]
        answer = choices.index(row["category"])
        found.append({"question": row["text"], "choices": shown, "answer": answer})
    return found


def texts(held_out: Path) -> list[dict[str, Any]]:
    """Held-out prompts with the teacher's answers."""
    lines = held_out.read_text("utf-8").splitlines()[:ANSWERS]
    return [{name: json.loads(line)[name] for name in ("prompt", "answer")} for line in lines]


def write_task(work: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """A task file (JSON is YAML) and its data beside it."""
    data, file = work / f"{task['task']}.jsonl", work / f"{task['task']}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    beside = {"dataset_kwargs": {"data_files": {"test": data.name}}}
    file.write_text(json.dumps(task | TASK | beside), "utf-8")
    return file


def asked(
    file: Path, intents: Path, answers: Path, system: str | None, work: Path, progress: Progress
) -> list[Evaluation]:
    return [
        evaluate(file, Plan([str(intents)]), work, progress),
        evaluate(file, Plan([str(answers)], chat=True, system=system), work, progress),
    ]


def compared(
    name: str, found: list[Evaluation], base: list[Evaluation]
) -> Iterator[dict[str, Any]]:
    for own, reference in zip(found, base, strict=True):
        task, other = own.tasks[0], reference.tasks[0]
        ours, theirs = verdicts(task), verdicts(other)
        score = task.scores[MAIN[task.name]]
        yield {
            "file": name,
            "bytes": own.model["bytes"],
            "task": task.name,
            "rows": len(ours),
            "score": score.value,
            "stderr": score.stderr,
            "differ": sum(a != b for a, b in zip(theirs, ours, strict=True)),
            "against_checkpoint": asdict(compare(theirs, ours)),
        }


def verdicts(task: TaskResult) -> list[bool]:
    return [each == 1.0 for each in task.verdicts(MAIN[task.name]) or []]


if __name__ == "__main__":
    main()
