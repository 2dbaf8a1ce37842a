"""A recipe of real customers' questions, to measure with: banking77 with 77 intents.

    python benchmarks/banking77_recipe.py DATA OUT [--prompts 800]

DATA holds banking77's `train.csv` (text,category) and `categories.json` (PolyAI 2020, CC-BY-4.0).
Writes OUT/recipe.yaml and OUT/prompts.jsonl, each prompt with its gold label as `reference`; then
`edgedistill build --recipe OUT --target ...` as with any recipe.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

SEED, FIRST = 7, 800
SYSTEM = (
    "You sort messages of a bank's customers. Answer with exactly one of these labels, and nothing "
    "else: "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=800)
    given = parser.parse_args()
    labels = json.loads((given.data / "categories.json").read_text("utf-8"))
    with (given.data / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    chosen = _chosen(len(rows), given.prompts)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"id": f"b-{i}", "prompt": rows[i]["text"], "reference": rows[i]["category"]},
            ensure_ascii=False,
        )
        for i in sorted(chosen)
    ]
    (given.out / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    (given.out / "recipe.yaml").write_text(json.dumps(_recipe(labels), indent=2), "utf-8")


def _chosen(rows: int, count: int) -> list[int]:
    """A larger choice holds the 800 of a smaller one, whose answers are paid for."""
    first = random.Random(SEED).sample(range(rows), min(count, FIRST))
    left = sorted(set(range(rows)) - set(first))
    return first + random.Random(SEED + 1).sample(left, count - len(first))


def _recipe(labels: list[str]) -> dict[str, object]:
    """JSON is YAML."""
    return {
        "name": "banking77",
        "description": "Sorts messages of a bank's customers into 77 intents.",
        "prompts": "prompts.jsonl",
        "data_licence": "CC-BY-4.0",
        "teacher": {
            "kind": "local",
            "model": "qwen2.5-coder-1.5b-instruct",
            "weights": "qwen2.5-coder-1.5b-instruct-q4_k_m",
            "licence": "Apache-2.0",
            "system": SYSTEM + ", ".join(labels) + ".",
            "context_tokens": 1024,
            "sampling": {"temperature": 0, "max_tokens": 24},
        },
        "collect": {"concurrency": 1, "timeout_seconds": 60},
        "curate": {"split": {"validation": 0.1, "held_out": 0.25, "seed": 1}},
        "check": {"kind": "label", "labels": labels},
        "student": {"weights": "smollm2-135m-instruct-q4_1", "system": "Intent", "max_tokens": 24},
        "distill": {
            "method": "sft",
            "lora": {"rank": 32, "alpha": 64},
            "learning_rate": 6.0e-4,
            "epochs": 4,
            "batch_size": 4,
            "evaluations": 2,
        },
        "bench": {"latency_prompts": 10, "examples": 20},
    }


if __name__ == "__main__":
    main()
