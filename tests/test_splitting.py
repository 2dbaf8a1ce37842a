"""What the split promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.recipe import SplitSpec
from edgedistill.splitting import Row, Split, split
from edgedistill.tokenmix import normalised

PARTS = ("train", "validation", "held_out")


def row(name: str, phrasing: str) -> Row:
    return Row(name, f"prompt {name}", "1", phrasing, False, 1.0, (), f"t-{name}", None)


def rows(count: int, phrasings: int) -> list[Row]:
    return [row(f"p{n}", f"f{n % phrasings}") for n in range(count)]


def placed(parts: Split) -> dict[str, str]:
    return {row.id: name for name in PARTS for row in getattr(parts, name)}


@given(
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=30),
    held_out=st.sampled_from([0.1, 0.2, 0.4]),
    validation=st.sampled_from([0.05, 0.1, 0.3]),
    unseen=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_split_keeps_its_promises(
    sizes: list[int], held_out: float, validation: float, unseen: float, seed: int
) -> None:
    given_rows = [row(f"{f} and {n}", f"f{f}") for f, size in enumerate(sizes) for n in range(size)]
    spec = SplitSpec(validation=validation, held_out=held_out, unseen_phrasings=unseen, seed=seed)
    parts = split(given_rows, spec)
    assert Counter(placed(parts).values()).total() == len(given_rows)
    learnt = {row.phrasing for row in parts.train}
    others = learnt | {row.phrasing for row in parts.validation}
    assert all(row.seen for row in parts.train)
    for held in parts.held_out:
        assert held.seen is (held.phrasing in learnt)
        assert held.seen or held.phrasing not in others
    prompts = {normalised(row.prompt) for row in (*parts.train, *parts.validation)}
    assert not prompts & {normalised(row.prompt) for row in parts.held_out}
    wanted = held_out * len(given_rows)
    assert abs(len(parts.held_out) - wanted) <= max(sizes)
    new = sum(not row.seen for row in parts.held_out)
    if wanted * unseen >= max(sizes) and max(sizes) > 1 and unseen < 1:
        assert new >= wanted * unseen - max(sizes)


@pytest.mark.parametrize("unseen", [0.0, 0.5, 1.0])
def test_counts_come_out_as_asked(unseen: float) -> None:
    parts = split(rows(500, 150), SplitSpec(unseen_phrasings=unseen))
    assert abs(len(parts.held_out) - 100) <= 2
    assert len(parts.validation) == 50
    assert abs(sum(not row.seen for row in parts.held_out) - 100 * unseen) <= 2


def test_another_seed_gives_another_split() -> None:
    one, two = (split(rows(200, 50), SplitSpec(seed=seed)) for seed in (0, 1))
    assert placed(one) != placed(two)


@pytest.mark.parametrize("change", ["add", "add a phrasing", "remove", "reword"])
def test_one_change_moves_few_other_prompts(change: str) -> None:
    before = rows(500, 150)
    after = {
        "add": [*before, row("new", "f3")],
        "add a phrasing": [*before, row("new", "another")],
        "remove": before[:250] + before[251:],
        "reword": [replace(r, phrasing="another") if r.id == "p250" else r for r in before],
    }[change]
    was, now = placed(split(before, SplitSpec())), placed(split(after, SplitSpec()))
    moved = [name for name in was if name in now and was[name] != now[name]]
    assert len(moved) <= 10


def test_order_of_rows_does_not_matter() -> None:
    given_rows = rows(200, 50)
    assert placed(split(given_rows, SplitSpec())) == placed(split(given_rows[::-1], SplitSpec()))


@given(worthless=st.sets(st.integers(0, 199), max_size=120))
@settings(max_examples=20, deadline=None)
def test_a_score_moves_no_row(worthless: set[int]) -> None:
    given_rows = rows(200, 60)
    scored = [replace(r, score=float(n not in worthless)) for n, r in enumerate(given_rows)]
    plain, parts = split(given_rows, SplitSpec()), split(scored, SplitSpec())
    none = {r.id for r in scored if not r.score}
    learnt = {name: part for name, part in placed(plain).items() if part != "train"}
    learnt |= {r.id: "train" for r in plain.train if r.id not in none}
    assert placed(parts) == learnt
    seen = {r.phrasing for r in parts.train}
    assert all(held.seen is (held.phrasing in seen) for held in parts.held_out)


def test_equal_prompts_in_two_parts_are_caught() -> None:
    same = [replace(r, prompt="always the same") for r in rows(50, 10)]
    with pytest.raises(AssertionError, match="held-out prompts"):
        split(same, SplitSpec())
