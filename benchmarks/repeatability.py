"""Do the intervals that `bench MODEL` states hold? The same model in several sittings.

    python benchmarks/repeatability.py MODEL --keep FOLDER [--recipe NAME] [--sittings 10] [--twice]

Each sitting is one whole `bench MODEL`, kept in FOLDER as a result file, so that a killed run goes
on behind the last whole one. Prints JSON: of each figure its mean over sittings, its spread (the
standard deviation as a share of the mean), half its stated interval as a share of the value (the
median over sittings), and its coverage: of all pairs of sittings, how often the interval of the
earlier one holds the later one's value. Disturbed sittings are counted, and left out.

With --twice each sitting measures the model twice, in turn, as two equal builds: of each figure how
far the two are apart, half the interval of their ratio, and how often that holds 1. What
planted_regression.py --real then makes of FOLDER says which losses they would tell.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from edgedistill import library, machine
from edgedistill.differences import difference
from edgedistill.measures import Measure
from edgedistill.model_prompt import asked_model
from edgedistill.progress import Silent
from edgedistill.prompts import held_out_of
from edgedistill.recipe import load_recipe
from edgedistill.result_file import Result, read_result, write_result
from edgedistill.sitting import TURNS, Plan, sit_in_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--recipe", help="its held-out prompts are asked")
    parser.add_argument("--workspace", type=Path, default=Path(".edgedistill"))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--sittings", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--twice", action="store_true", help="two equal builds in turn")
    parser.add_argument("--turns", type=int, default=TURNS, help="with --twice")
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    asked, plan = asked_model(given.model, None, None, None), Plan(given.repeats, turns=given.turns)
    if given.recipe is not None:
        held = load_recipe(library.find("recipe", given.recipe))
        asked = asked_model(given.model, held.student, None, None)
        prompts = held_out_of(held, given.sample, given.workspace, Silent())
        plan = replace(plan, prompts=prompts, check=held.check)
    sittings: list[list[Result]] = []
    for number in range(given.sittings):
        names = [f"sitting-{number:02d}{each}" for each in (("-a", "-b") if given.twice else ("",))]
        files = [given.keep / f"{name}.json" for name in names]
        if not all(file.is_file() for file in files):
            print(f"sitting {number + 1} of {given.sittings}", file=sys.stderr)
            found = sit_in_turn([asked] * len(files), plan, Silent())
            for result, file in zip(found, files, strict=True):
                write_result(result, file)
        sittings.append([read_result(file) for file in files])
        if _asked(sittings[0][0]) != _asked(sittings[-1][0]):
            parser.error(f"{files[0]} is of another model, other prompts or settings: "
                         "another --keep")  # fmt: skip
    told = of_turns(sittings) if given.twice else summary([result for (result,) in sittings])
    print(json.dumps(told, indent=2))


def _asked(result: Result) -> tuple[object, ...]:
    """What must be alike in all sittings."""
    mix = result.token_mix
    return result.model["sha256"], dict(result.settings), None if mix is None else mix["digest"]


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What the sittings say of each figure, and of all together."""
    calm = [result for result in results if not result.load["busy"]]
    figures = {name: [r.figures[name] for r in calm] for name in results[0].figures}
    rows = {name: _figure(each) for name, each in figures.items() if len(each) > 1}
    pairs = sum(row["pairs"] for row in rows.values())
    held = sum(row["held"] for row in rows.values())
    return {
        "machine": machine.facts(),
        "model": results[0].model["name"],
        "sittings": len(calm),
        "disturbed": len(results) - len(calm),
        "figures": rows,
        "coverage": round(held / pairs, 3) if pairs else None,
    }


def _figure(sittings: Sequence[Measure]) -> dict[str, Any]:
    values = [each.value for each in sittings]
    mean = statistics.fmean(values)
    held = [
        earlier.low <= later.value <= earlier.high for earlier, later in combinations(sittings, 2)
    ]
    halves = [each.share for each in sittings if not math.isnan(each.share)]
    return {
        "mean": mean,
        "unit": sittings[0].unit,
        "spread": round(statistics.stdev(values) / mean, 4) if mean else 0.0,
        "half_interval": round(statistics.median(halves), 4) if halves else None,
        "coverage": round(sum(held) / len(held), 3),
        "held": sum(held),
        "pairs": len(held),
    }


def of_turns(sittings: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """What equal builds in turn say of each figure."""
    calm = [pair for pair in sittings if not pair[0].load["busy"]]
    return {
        "machine": machine.facts(),
        "model": sittings[0][0].model["name"],
        "sittings": len(calm),
        "disturbed": len(sittings) - len(calm),
        "figures": {name: _turns(name, calm) for name in sittings[0][0].figures},
    }


def _turns(name: str, pairs: Sequence[Sequence[Result]]) -> dict[str, Any]:
    found = [difference(name, two, one) for one, two in pairs]
    known = [
        (each.value, each.low, each.high)
        for each in found
        if each is not None and each.value and each.low and each.high
    ]
    if not known:
        return {"pairs": 0}
    return {
        "pairs": len(known),
        "apart": round(statistics.fmean(abs(math.log(ratio)) for ratio, _, _ in known), 4),
        "half_interval": round(statistics.median(math.log(h / low) / 2 for _, low, h in known), 4),
        "holds_1": sum(low <= 1 <= high for _, low, high in known),
    }


if __name__ == "__main__":
    main()
