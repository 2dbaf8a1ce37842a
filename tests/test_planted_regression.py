"""The benchmark that plants losses, on results as repeatability.py keeps them."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

from sample_results import sample_result

from edgedistill.result_set import Named

ROOT = Path(__file__).resolve().parents[1]
real = runpy.run_path(str(ROOT / "benchmarks" / "planted_regression.py"))["_real"]
LESS = "tg128 < 0.97 * baseline"
FEWER = "agreement < baseline - 0.02"


def kept(count: int, busy: int = 0, in_turn: bool = False) -> list[Named]:
    found = []
    for number in range(count):
        made = sample_result(number, processes=10 if in_turn else 3, busy=number < busy)
        sitting = str(number // 2) if in_turn else None
        found.append(Named(str(number), Path("r.json"), replace(made, sitting=sitting)))
    return found


def test_the_two_of_each_sitting_are_held_against_each_other() -> None:
    found = real(kept(12, in_turn=True))
    assert (found["in_turn"], found["decode"]["pairs"], found["decode"]["planted"]) == (6, 6, 24)
    assert found["decode"]["worse"][LESS]["beyond_intervals"] == 1
    assert found["decode"]["equal"][LESS]["beyond_intervals"] == 0
    assert found["agreement"]["worse"][FEWER]["beyond_intervals"] == 1
    assert found["agreement"]["equal"][FEWER]["beyond_intervals"] == 0


def test_sittings_in_turn_are_taken_together() -> None:
    found = real(kept(14, in_turn=True), together=3)["decode"]
    assert (found["pairs"], found["planted"]) == (2, 20)  # the seventh is left over
    assert found["worse"][LESS]["beyond_intervals"] == 1


def test_answers_of_a_disturbed_machine_count_and_its_rates_do_not() -> None:
    found = real(kept(4, busy=1))
    assert (found["disturbed"], found["decode"]["pairs"], found["agreement"]["pairs"]) == (1, 6, 12)
    assert found["agreement"]["prompts"] == 400
    assert "decode" not in real(kept(2, busy=2))
