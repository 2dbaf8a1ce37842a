"""How often a judge is right, and how far the place of an answer bends it.

    python benchmarks/judge_agreement.py JUDGE --banking77 DATA [--pairs 60] [--reasons]
    python benchmarks/judge_agreement.py JUDGE --result RESULT.json [--pairs 60] [--rubric TEXT]

JUDGE is a GGUF file, or with --model ID the URL of a server. Each pair is a question, an answer
that is right by gold and one that is wrong, judged in both orders by the prompts of `edgedistill
judge`. DATA holds banking77's `test.csv` (text,category) and `categories.json` (PolyAI 2020,
CC-BY-4.0): the wrong label of a question is the one that is spelt most like its own. A RESULT is a
file of `edgedistill bench MODEL --out`: the wrong answers are those that its check calls not the
reference. Prints JSON: accuracy against gold (both orders must name the right answer), of each
order by itself, Cohen's kappa between the verdicts and which place held the right answer, and
position bias, each with its 95 % interval, and the machine.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.judge import Desk, Question, judged_pairs
from edgedistill.judging import FIRST, PAIR, SECOND, Judge, asked_at, question_of, turned
from edgedistill.progress import Silent
from edgedistill.recipe import CollectSpec, Sampling
from edgedistill.result_file import read_result
from edgedistill.teacher import is_loopback
from edgedistill.verdicts import kappa, of_pairs

SEED = 3
BANKING = (
    "Each answer names the intent of a bank customer's message, one of 77. It is correct where it "
    "is what the customer wants to know or to have done."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("judge")
    parser.add_argument("--banking77", type=Path)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--model", help="its ID; by default the file's name")
    parser.add_argument("--api-key-env")
    parser.add_argument("--rubric", default="")
    parser.add_argument("--reasons", action="store_true", help="let it say why before it decides")
    parser.add_argument("--workspace", type=Path, default=Path(".edgedistill"))
    given = parser.parse_args()
    if (given.banking77 is None) == (given.result is None):
        parser.error("give either --banking77 or --result")
    pairs = _of_banking(given.banking77) if given.banking77 else _of_result(given.result)
    chosen = random.Random(SEED).sample(pairs, min(given.pairs, len(pairs)))
    rubric = given.rubric or (BANKING if given.banking77 else "")
    teacher = asked_at(given.judge, given.model or Path(given.judge).stem, given.api_key_env,
                       Sampling(max_tokens=256 if given.reasons else 24))  # fmt: skip
    local = not given.judge.startswith("http") or is_loopback(given.judge)
    spec = CollectSpec(concurrency=1 if local else 8, attempts=3)
    desk = Desk(Judge(teacher, rubric, given.reasons), given.workspace, spec)
    print(f"{len(chosen)} pairs, {2 * len(chosen)} calls", file=sys.stderr)
    started = time.monotonic()
    found = judged_pairs(desk, chosen, Silent())
    print(json.dumps(_told(desk, found, time.monotonic() - started), indent=2))


def _told(desk: Desk, found: list[Any], seconds: float) -> dict[str, Any]:
    places = [
        each
        for p in found
        if p.verdict is not None
        for each in ((p.shown_first, p.gold), (p.shown_second, turned(str(p.gold))))
    ]
    told = of_pairs(found)
    return {
        "machine": machine.facts(),
        "judge": desk.judge.teacher.model,
        "prompt_version": desk.judge.version(PAIR),
        "seconds": round(seconds, 1),
        "asked": desk.asked,
        "failed": len(desk.failed),
        "unread_said": desk.unread[:3],
        "kappa_of_places": kappa(
            [str(a) for a, _ in places], [str(b) for _, b in places], together=2
        ),
        **told,
    }


def _of_banking(data: Path) -> list[Question]:
    labels = json.loads((data / "categories.json").read_text("utf-8"))
    with (data / "test.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [
        _question(f"b-{at}", row["text"], row["category"], _like(row["category"], labels))
        for at, row in enumerate(rows)
    ]


def _like(label: str, labels: list[str]) -> str:
    """The other label that is spelt most like it."""
    others = [each for each in labels if each != label]
    return max(others, key=lambda each: difflib.SequenceMatcher(None, label, each).ratio())


def _of_result(file: Path) -> list[Question]:
    likeness = read_result(file).likeness or {"rows": []}
    return [
        _question(row["id"], question_of(row["prompt"], row.get("history", ())),
                  row["reference"], row["answer"])
        for row in likeness["rows"]
        if row.get("gold") is False and "prompt" in row and row["answer"]
    ]  # fmt: skip


def _question(name: str, question: str, right: str, wrong: str) -> Question:
    """The right answer is the pair's first for half of them, by the name alone."""
    if random.Random(f"{SEED}-{name}").random() < 0.5:
        return Question(name, question, right, wrong, FIRST)
    return Question(name, question, wrong, right, SECOND)


if __name__ == "__main__":
    main()
