"""What verdicts of a judge come to."""

from __future__ import annotations

import pytest

from edgedistill.judging import FIRST, SECOND, TIE
from edgedistill.verdicts import PairVerdict, kappa, of_grades, of_pairs


def pairs(shown_first: str | None, shown_second: str | None, count: int = 10) -> list[PairVerdict]:
    return [PairVerdict(f"p{i}", shown_first, shown_second, gold=FIRST) for i in range(count)]


def test_a_judge_that_names_one_answer_in_both_orders() -> None:
    found = of_pairs(pairs(FIRST, SECOND))
    assert (found["win"], found["tie"], found["loss"]) == (10, 0, 0)
    assert found["position"]["flips"]["value"] == 0
    assert found["position"]["to_first"]["value"] == 0.5
    assert found["gold"]["accuracy"]["value"] == found["gold"]["single"]["value"] == 1
    assert found["p_value"] == pytest.approx(2 / 2**10)


def test_a_judge_that_names_a_place() -> None:
    found = of_pairs(pairs(SECOND, SECOND))
    assert (found["win"], found["tie"], found["loss"]) == (0, 10, 0)
    assert found["position"]["flips"]["value"] == 1
    assert found["position"]["to_first"]["value"] == 0
    assert (found["gold"]["accuracy"]["value"], found["gold"]["single"]["value"]) == (0, 0.5)


def test_one_win_and_one_tie_is_a_tie() -> None:
    assert of_pairs(pairs(FIRST, TIE))["tie"] == 10


def test_what_cannot_be_read_counts_as_no_verdict_and_not_right() -> None:
    found = of_pairs([*pairs(FIRST, SECOND, 3), *pairs(FIRST, None, 1)])
    assert (found["unreadable"], found["win"], found["pairs"]) == (1, 3, 4)
    assert found["gold"]["accuracy"]["value"] == 0.75


def test_equal_answers_are_ties_that_tell_nothing_of_the_judge() -> None:
    equal = PairVerdict("e", TIE, TIE, asked=False)
    found = of_pairs([equal, *pairs(FIRST, FIRST, 2)])
    assert (found["equal"], found["tie"]) == (1, 3)
    assert found["position"]["flips"]["n"] == 2


def test_nothing_read_is_no_figure() -> None:
    found = of_pairs(pairs(None, None, 2))
    assert found["difference"] is found["position"] is None


def test_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement .7, by chance .5.
    ours = ["y"] * 25 + ["n"] * 25
    theirs = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    found = kappa(ours, theirs)
    assert found is not None
    assert found["value"] == pytest.approx(0.4)
    assert found["low"] < 0.4 < found["high"]
    assert kappa(["y", "y"], ["y", "y"]) is None


def test_grades_against_gold() -> None:
    found = of_grades([9, 8, 2, None], [True, False, False, True])
    assert found["unreadable"] == 1
    assert found["mean"]["value"] == pytest.approx(19 / 3)
    assert found["gold"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_two_verdicts_that_hang_together_are_drawn_as_one() -> None:
    """A judge that is right of half the pairs in both orders tells as much as 20 coins, not 40."""
    found = of_pairs([*pairs(FIRST, SECOND, 10), *pairs(SECOND, FIRST, 10)])["gold"]
    assert found["single"]["value"] == found["accuracy"]["value"] == 0.5
    wide = found["accuracy"]["high"] - found["accuracy"]["low"]
    assert found["single"]["high"] - found["single"]["low"] == pytest.approx(wide, abs=0.06)
    once, twice = ["y", "n", "n", "y"] * 5, ["y", "y", "n", "n"] * 5
    alone = kappa(once, twice)
    doubled = kappa([a for a in once for _ in "12"], [b for b in twice for _ in "12"], together=2)
    assert alone is not None
    assert doubled == {**alone, "n": 40}
