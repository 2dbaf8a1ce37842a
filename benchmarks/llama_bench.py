"""Our pp512 and tg128 beside llama.cpp's own llama-bench, on the same files in one run.

    python benchmarks/llama_bench.py LLAMA_BENCH MODEL.gguf... [--rounds 5] [--threads N]

LLAMA_BENCH is the program, built from the source package of the installed llama-cpp-python (its
vendor/llama.cpp: `cmake -B b -DCMAKE_BUILD_TYPE=Release && cmake --build b -t llama-bench`).
Every round runs each file in both, who goes first alternating. Prints JSON: tokens/s of both, and
ours / theirs as a median over rounds with its middle half; and, of both programs' runs, each file's
rate over the first file's in the same round (`of_first`): is it slower than the stock type of as
many bytes?
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from edgedistill import machine
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import size_of

PP, TG = 512, 128
RUNS = 3  # of each program in a round, behind a warm-up
Rates = dict[str, float]  # "pp" and "tg", tokens/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.threads())
    given = parser.parse_args()
    ours = partial(_ours, threads=given.threads)
    theirs = partial(_theirs, given.program, threads=given.threads)
    rows = rows_of("llama_bench", given.models, given.rounds, ours, theirs)
    print(
        json.dumps({"machine": machine.facts(), "threads": given.threads, "rows": rows}, indent=2)
    )


def rows_of(
    peer: str,
    models: Sequence[Path],
    rounds: int,
    ours: Callable[[Path], Rates],
    theirs: Callable[[Path], Rates],
) -> list[dict[str, object]]:
    """Each model's rates, in so many rounds of both programs; who goes first alternates."""
    found: dict[Path, list[tuple[Rates, Rates]]] = {model: [] for model in models}
    for number in range(rounds):
        for model, pairs in found.items():
            print(f"round {number + 1}: {model.name}", file=sys.stderr)
            if number % 2:
                its = theirs(model)
                pairs.append((ours(model), its))
            else:
                mine = ours(model)
                pairs.append((mine, theirs(model)))
    first = found[models[0]]
    return [_row(model.name, size_of(model), each, first, peer) for model, each in found.items()]


def _ours(model: Path, threads: int) -> Rates:
    with LlamaCpp(model, threads=threads, context_tokens=PP) as loaded:
        found = loaded.bench(PP, TG, RUNS)
        return {test: statistics.fmean(rates) for test, rates in found.items()}


def _theirs(program: Path, model: Path, threads: int) -> Rates:
    words = [program, "-m", model, "-t", threads, "-p", PP, "-n", TG, "-r", RUNS, "-o", "json"]
    done = subprocess.run([str(w) for w in words], capture_output=True, check=True, text=True)
    tests = json.loads(done.stdout)
    return {"pp" if test["n_prompt"] else "tg": float(test["avg_ts"]) for test in tests}


def _row(
    name: str,
    size: int,
    pairs: list[tuple[Rates, Rates]],
    first: list[tuple[Rates, Rates]],
    peer: str,
) -> dict[str, object]:
    """A model's rates in both programs by rounds, and beside those of the `first` model."""
    row: dict[str, object] = {"model": name, "bytes": size}
    for test in ("pp", "tg"):
        of_first = [
            mine[test] / its[test]
            for both, its_both in zip(pairs, first, strict=True)
            for mine, its in zip(both, its_both, strict=True)
        ]
        row[test] = {
            "ours": round(statistics.median(ours[test] for ours, _ in pairs), 1),
            peer: round(statistics.median(theirs[test] for _, theirs in pairs), 1),
            **_spread("ratio", [ours[test] / theirs[test] for ours, theirs in pairs]),
            **_spread("of_first", of_first),
        }
    return row


def _spread(name: str, ratios: list[float]) -> dict[str, object]:
    """Median, and the middle half of the runs."""
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {
        name: round(statistics.median(ratios), 3),
        f"{name}_middle_half": [round(low, 3), round(high, 3)],
    }


if __name__ == "__main__":
    main()
