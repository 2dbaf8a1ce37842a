"""Shares on parts of the prompts, and which are unlike the rest."""

from __future__ import annotations

from typing import Any

import pytest

from edgedistill.slices import LEAST, fisher, sliced, slices_of, standing_out


def rows(count: int, wrong: range = range(0), **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "prompt": "x" * (i + 1), "same": i not in wrong, **more}
        for i in range(count)
    ]


def tagged(count: int, tags: dict[str, range]) -> list[dict[str, Any]]:
    made = rows(count)
    for i, row in enumerate(made):
        row["tags"] = [tag for tag, held in tags.items() if i in held]
    return made


def test_fisher_by_hand() -> None:
    # 3 of 4 against 1 of 4 (the tea lady): 34 of 70 tables are no likelier.
    assert fisher([True] * 3 + [False], [True] + [False] * 3) == pytest.approx(34 / 70)
    assert fisher([True] * 5, [True] * 5) == 1


def test_thirds_of_length_hold_every_prompt_once() -> None:
    thirds = slices_of(rows(31))
    assert [each.name for each in thirds] == [
        "1 to 11 characters", "12 to 21 characters", "22 to 31 characters",
    ]  # fmt: skip
    assert sum(len(each.ids) for each in thirds) == 31


def test_prompts_of_few_lengths_have_no_thirds() -> None:
    assert slices_of([{"id": str(i), "prompt": "same"} for i in range(40)]) == []


def test_small_tags_are_folded_and_equal_ones_joined() -> None:
    tags = {"a": range(20), "b": range(20), "c": range(3), "d": range(3, 6), "all": range(40)}
    names = {each.name: len(each.ids) for each in slices_of(tagged(40, tags)) if each.by == "tag"}
    assert names == {"a = b": 20, f"other tags (2 of less than {LEAST} prompts)": 6}


def test_a_slice_that_differs_beyond_chance_is_said() -> None:
    found = sliced(rows(60, wrong=range(18)))
    short, *others = found
    assert short["agreement"]["value"] == pytest.approx(0.1)
    assert short["agreement"]["differs"] == "below"
    assert {each["agreement"]["differs"] for each in others} == {"above"}
    assert "agreement is below the rest on prompt length 1 to 20" in standing_out(found)[0]


def test_one_wrong_answer_is_chance() -> None:
    assert standing_out(sliced(rows(60, wrong=range(1)))) == []


def test_a_slice_of_few_is_marked_and_not_judged() -> None:
    found = sliced(rows(12, wrong=range(4)))
    assert all(each["few"] and each["agreement"]["p_value"] is None for each in found)
