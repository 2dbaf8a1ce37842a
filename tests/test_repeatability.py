"""The benchmark that asks whether stated intervals hold, on made sittings."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

from sample_results import sample_result

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "repeatability.py"))
summary, of_turns = SCRIPT["summary"], SCRIPT["of_turns"]


def test_intervals_of_one_noise_hold() -> None:
    found = summary([sample_result(seed) for seed in range(20)])
    assert found["sittings"] == 20
    assert found["coverage"] > 0.9
    assert found["figures"]["tg128"]["pairs"] == 190


def test_sittings_that_drift_apart_are_told() -> None:
    drift = [sample_result(i, decode=40 + 3 * i, noise=0.001) for i in range(5)]
    decode = summary(drift)["figures"]["tg128"]
    assert decode["coverage"] < 0.3
    assert decode["spread"] > 0.08


def test_disturbed_sittings_are_left_out() -> None:
    found = summary([sample_result(i, busy=i == 1) for i in range(3)])
    assert (found["sittings"], found["disturbed"]) == (2, 1)


def test_equal_builds_in_turn() -> None:
    pairs = [
        [replace(sample_result(2 * i + at, processes=10), sitting=str(i)) for at in (0, 1)]
        for i in range(40)
    ]
    found = of_turns([*pairs, (sample_result(1, busy=True), sample_result(2, busy=True))])
    assert (found["sittings"], found["disturbed"]) == (40, 1)
    decode = found["figures"]["tg128"]
    assert decode["pairs"] == 40
    assert 36 <= decode["holds_1"] <= 40
    assert 0.001 < decode["apart"] < decode["half_interval"] < 0.02
