"""Does `compare --fail-if` find a planted regression, and leave equal builds alone?

    python benchmarks/planted_regression.py [--tries 200]
    python benchmarks/planted_regression.py --real FOLDER

With --real every two sittings that repeatability.py has kept there, of one model on one machine,
are taken for a baseline and a candidate: as they are (equal builds), and with each decode rate of
the candidate 5 % less and 3 points of its right answers wrong. Their noise is real. Of what it has
kept with --twice the two results of each sitting are taken, the first for the baseline.

Without it results are made, not measured: with a pace for each process, values around it, and with
answers of which some change for no reason. A true sitting also differs from another by what no
process of its own shows, such as a warmer machine: that is not in here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the results that the tests are made of

from sample_results import (  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
    changed,
    first_answers,
    sample_result,
)

from edgedistill.bench.agreement import bootstrap  # noqa: E402
from edgedistill.compare import compare  # noqa: E402
from edgedistill.measures import measure  # noqa: E402
from edgedistill.result_file import Result  # noqa: E402
from edgedistill.result_set import Named, read_all  # noqa: E402

DECODE, SLOWER = 40.0, 0.95
LOST = 0.03  # points of agreement
CHURN = 0.01  # of the prompts, each way, for no reason: between equal builds, too
NOISES, PROCESSES, PROMPTS = (0.003, 0.008, 0.02), (3, 5), (110, 400, 1000)
LEAST_TRIES = 20  # to plant something in real results
SPEED = ("tg128 < baseline", "tg128 < 0.97 * baseline", "tg128 < 0.95 * baseline")
ANSWERS = ("agreement < baseline", "agreement < baseline - 0.02", "agreement < baseline - 0.03")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--together", type=int, default=1, help="sittings in turn taken as one")
    given = parser.parse_args()
    if given.real is not None:
        print(json.dumps(_real(read_all([given.real]), given.together), indent=2))
        return
    tries = given.tries
    speed = [
        {"process_noise": noise, "processes": count, **_speed(tries, noise, count)}
        for noise in NOISES
        for count in PROCESSES
    ]
    answers = [{"prompts": count, **_answers(tries, count)} for count in PROMPTS]
    print(json.dumps({"tries": tries, "decode": speed, "agreement": answers}, indent=2))


def _real(kept: list[Named], together: int = 1) -> dict[str, Any]:
    """What each condition flags of pairs of kept results: of rates where nothing disturbed them, of
    answers in any case."""
    results = [each.result for each in kept]
    calm = _joined(_pairs([each for each in results if not each.load["busy"]]), together)
    asked = _pairs([each for each in results if each.likeness is not None])
    found: dict[str, Any] = {
        "machine": results[0].device["cpu"],
        "results": len(results),
        "disturbed": sum(bool(each.load["busy"]) for each in results),
        "in_turn": len({each.sitting for each in results} - {None}),
    }
    for name, conditions, pairs in (("decode", SPEED, calm), ("agreement", ANSWERS, asked)):
        if pairs:
            tries = pairs * math.ceil(LEAST_TRIES / len(pairs))  # other answers are lost in each
            planted = [(base, _worse(ours, seed)) for seed, (base, ours) in enumerate(tries)]
            found[name] = {
                "pairs": len(pairs),
                "planted": len(planted),
                "equal": _flagged(conditions, pairs),
                "worse": _flagged(conditions, planted),
            }
    if asked:
        found["agreement"]["prompts"] = len((asked[0][0].likeness or {})["rows"])
    return found


def _pairs(results: list[Result]) -> list[tuple[Result, Result]]:
    """Baseline and candidate: the two of each sitting in which they took turns, else all ordered
    pairs."""
    turns: dict[str, list[Result]] = {}
    for each in results:
        if each.sitting is not None:
            turns.setdefault(each.sitting, []).append(each)
    pairs = [(two[0], two[1]) for two in turns.values() if len(two) == 2]
    return pairs or list(itertools.permutations(results, 2))


def _joined(pairs: list[tuple[Result, Result]], count: int) -> list[tuple[Result, Result]]:
    """So many pairs, one behind the other, as one with all their turns of tg128."""
    whole = [pairs[at : at + count] for at in range(0, len(pairs) - count + 1, count)]
    return [
        (_all_turns([base for base, _ in each]), _all_turns([ours for _, ours in each]))
        for each in whole
    ]


def _all_turns(results: list[Result]) -> Result:
    """The first, with the turns of all."""
    groups = [group for each in results for group in each.figures["tg128"].groups]
    figures = {**results[0].figures, "tg128": measure(groups, "tokens/s")}
    return replace(results[0], figures=figures)


def _worse(result: Result, seed: int) -> Result:
    """5 % slower in decode, and 3 points of its answers wrong that were right."""
    tg = result.figures["tg128"]
    slower = measure([[rate * SLOWER for rate in group] for group in tg.groups], tg.unit)
    made = replace(result, figures={**result.figures, "tg128": slower})
    if result.likeness is None:
        return made
    rows = [dict(row) for row in result.likeness["rows"]]
    right = [row for row in rows if row.get("same")]
    for row in random.Random(seed).sample(right, min(len(right), round(LOST * len(rows)))):
        row["same"] = False
    share = asdict(bootstrap([bool(row["same"]) for row in rows if "same" in row], 2000, 0))
    return replace(made, likeness={**result.likeness, "rows": rows, "agreement": share})


def _speed(tries: int, noise: float, processes: int) -> dict[str, Any]:
    """Of a build that is 5 % slower, and of an equal one, the share that each condition flags."""

    apart = round(1e8 * noise) + 10_000_000 * processes  # no two settings draw the same noise

    def sitting(seed: int, share: float) -> Result:
        given = {"decode": DECODE * share, "noise": noise, "processes": processes}
        made: Result = sample_result(seed + apart, **given)
        return made

    found = {"slower": SLOWER, "equal": 1.0}
    return {
        name: _flagged(
            SPEED, [(sitting(2 * i, 1.0), sitting(2 * i + 1, share)) for i in range(tries)]
        )
        for name, share in found.items()
    }


def _answers(tries: int, prompts: int) -> dict[str, Any]:
    """The same of agreement: each right answer is lost with a chance that takes 3 points in all."""
    return {
        name: _flagged(ANSWERS, [_pair(seed, prompts, lost) for seed in range(tries)])
        for name, lost in (("worse", LOST), ("equal", 0.0))
    }


def _pair(seed: int, prompts: int, lost: float) -> tuple[Result, Result]:
    draw, before = random.Random(f"{seed}-{prompts}"), first_answers(prompts)
    losing = sum(draw.random() < lost + CHURN for _ in range(prompts))
    gaining = sum(draw.random() < CHURN for _ in range(prompts))
    after = changed(before, losing, min(gaining, before.count(False)), seed)
    return sample_result(2 * seed, right=before), sample_result(2 * seed + 1, right=after)


def _flagged(
    conditions: tuple[str, ...], pairs: list[tuple[Result, Result]]
) -> dict[str, dict[str, float]]:
    """By condition: the share of pairs for which it holds, beyond the intervals and without."""
    counts = {text: {"beyond_intervals": 0.0, "intervals_ignored": 0.0} for text in conditions}
    for base, ours in pairs:
        held = [Named("base", Path("base.json"), base), Named("ours", Path("ours.json"), ours)]
        for name, ignored in (("beyond_intervals", False), ("intervals_ignored", True)):
            judged = compare(held, held[0], conditions, ignore_intervals=ignored).judged
            for each in judged:
                counts[each.condition][name] += (each.holds is True) / len(pairs)
    return {text: {k: round(v, 4) for k, v in each.items()} for text, each in counts.items()}


if __name__ == "__main__":
    main()
