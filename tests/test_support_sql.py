"""The default recipe's data: reproducible, varied, and answerable."""

import json
import runpy
import sqlite3
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "support-sql"
PROMPTS = [json.loads(line) for line in (RECIPE / "prompts.jsonl").read_text("utf-8").splitlines()]
MAKE_DATABASE = runpy.run_path(str(RECIPE / "make_database.py"))
MAKE_PROMPTS = runpy.run_path(str(RECIPE / "make_prompts.py"))


def tag(prompt: dict[str, Any], name: str) -> str:
    tags = dict(tag.split(":", 1) for tag in prompt["tags"])
    return str(tags[name])


def dump(path: Path) -> list[str]:
    return list(sqlite3.connect(path).iterdump())


@pytest.fixture(scope="module")
def database() -> sqlite3.Connection:
    return sqlite3.connect(f"file:{RECIPE / 'tickets.db'}?mode=ro", uri=True)


def test_script_reproduces_database(tmp_path: Path) -> None:
    MAKE_DATABASE["write_database"](tmp_path / "tickets.db")
    assert dump(tmp_path / "tickets.db") == dump(RECIPE / "tickets.db")


def test_script_reproduces_prompts(tmp_path: Path) -> None:
    MAKE_PROMPTS["write_prompts"](tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_bytes() == (RECIPE / "prompts.jsonl").read_bytes()


@pytest.mark.parametrize("column", ["customer", "product", "channel", "priority", "status"])
def test_no_two_values_are_equally_frequent(database: sqlite3.Connection, column: str) -> None:
    rows = database.execute(f"SELECT COUNT(*) FROM tickets GROUP BY {column}").fetchall()
    assert len(set(rows)) == len(rows)


def test_no_customer_opens_two_tickets_a_day(database: sqlite3.Connection) -> None:
    rows, days = database.execute(
        "SELECT COUNT(*), COUNT(DISTINCT customer || created) FROM tickets"
    ).fetchone()
    assert rows == days


def test_there_are_enough_prompts_and_phrasings() -> None:
    assert len(PROMPTS) >= 500
    assert len({tag(prompt, "phrasing") for prompt in PROMPTS}) >= 180


def test_every_phrasing_has_all_its_fills() -> None:
    fills = Counter(tag(prompt, "phrasing") for prompt in PROMPTS)
    assert set(fills.values()) == {2, 3}


def test_ids_are_unique() -> None:
    assert len({prompt["id"] for prompt in PROMPTS}) == len(PROMPTS)


def test_no_prompt_repeats_another_after_normalisation() -> None:
    assert len({MAKE_PROMPTS["normalise"](prompt["prompt"]) for prompt in PROMPTS}) == len(PROMPTS)


def test_phrasings_differ_by_more_than_a_word() -> None:
    words = [phrasing.prompt.lower().split() for phrasing in MAKE_PROMPTS["read_phrasings"]()]
    alike = [
        (" ".join(one), " ".join(other))
        for one, other in combinations(words, 2)
        if SequenceMatcher(None, one, other, autojunk=False).ratio() > 0.85
    ]
    assert alike == []


def test_fewer_than_three_percent_of_references_find_nothing(database: sqlite3.Connection) -> None:
    results = [database.execute(prompt["reference"]).fetchall() for prompt in PROMPTS]
    empty = [rows for rows in results if all(value in (None, 0) for row in rows for value in row)]
    assert len(empty) < 0.03 * len(results)


def test_no_reference_depends_on_row_order(database: sqlite3.Connection) -> None:
    backwards = MAKE_PROMPTS["shuffled_copy"](database)
    unstable = [
        prompt["id"]
        for prompt in PROMPTS
        if sorted(database.execute(prompt["reference"]), key=repr)
        != sorted(backwards.execute(prompt["reference"]), key=repr)
    ]
    assert unstable == []


def test_teacher_prompt_names_every_value(database: sqlite3.Connection) -> None:
    system = (RECIPE / "teacher-system.txt").read_text("utf-8")
    columns = ("customer", "product", "channel", "priority", "status", "agent")
    values = {
        value
        for column in columns
        for (value,) in database.execute(f"SELECT DISTINCT {column} FROM tickets")
        if value is not None
    }
    assert {value for value in values if value not in system} == set()
