"""Altered prompts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import tiny

from edgedistill.fidelity import EvalRow
from edgedistill.fit.perturbed import perturb, perturbed_rows
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec

ROWS = [
    EvalRow(f"r{i}", f"how many tickets came in by phone number {i}", f"answer {i}", "", seen=True)
    for i in range(5)
]
WORDS = [" one", " two"]


def shown(folder: Path) -> StudentPrompt:
    return StudentPrompt(tiny.tiny_student(folder).folder, StudentSpec(weights="tiny"))


def test_an_altered_prompt_keeps_most_of_its_words() -> None:
    prompt = " ".join(f"word{i}" for i in range(100))
    kept, sizes = [], []
    for seed in range(50):
        altered = perturb(prompt, WORDS, random.Random(seed)).split()
        kept.append(len({*altered} & {*prompt.split()}))
        sizes.append(len(altered))
    assert 70 < sum(kept) / 50 < 92  # dropped, replaced and misspelt: .18 of 100, the rest stays
    assert min(kept) < max(kept)
    assert 90 < sum(sizes) / 50 < 110


def test_white_space_stays_and_nothing_becomes_empty() -> None:
    text = "first line\n\nsecond\tline, of a longer text that has several words\n    indented"
    altered = [perturb(text, WORDS, random.Random(seed)) for seed in range(200)]
    assert sum("\n\n" in each for each in altered) > 120
    assert all(perturb("a b", WORDS, random.Random(seed)) for seed in range(300))
    assert perturb("", WORDS, random.Random(0)) == ""


def test_a_language_without_spaces_is_altered_by_character() -> None:
    text = "今天有多少张未解决的工单是通过电话提交的"
    altered = {perturb(text, ["电"], random.Random(seed)) for seed in range(20)}
    assert len(altered) > 10
    assert all(len({*each} & {*text}) > len({*text}) / 2 for each in altered)


def test_rows_are_compared_only_and_decided_by_the_seed(tmp_path: Path) -> None:
    prompt = shown(tmp_path)
    made = perturbed_rows(ROWS, prompt, 12, 500, "0-1")
    assert len(made) == 12
    assert all(row.general for row in made)
    assert {row.id for row in made} == {f"perturbed-r{i}" for i in range(5)}
    assert made == perturbed_rows(ROWS, prompt, 12, 500, "0-1")
    assert made != perturbed_rows(ROWS, prompt, 12, 500, "0-2")
    assert perturbed_rows(ROWS, prompt, 0, 500, "0-1") == []


def test_rows_that_became_too_long_are_altered_anew(tmp_path: Path) -> None:
    prompt = shown(tmp_path)
    lengths = sorted(len(row) for row in perturbed_rows(ROWS, prompt, 40, 500, "0-1"))
    middle = lengths[len(lengths) // 2]
    made = perturbed_rows(ROWS, prompt, 40, middle, "0-1")
    assert max(len(row) for row in made) <= middle
    assert sum(length <= middle for length in lengths) < len(made) - 5


def test_rows_that_become_too_long_each_time_are_left_out(tmp_path: Path) -> None:
    prompt = shown(tmp_path)
    long = replace(ROWS[0], prompt=" ".join(["word"] * 300))
    made = perturbed_rows([*ROWS, long], prompt, 6, 200, "0-1")
    assert {row.id for row in made} == {f"perturbed-r{i}" for i in range(5)}
