"""Checks: what is a valid answer, what says the same, and what cannot be done to the database."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from edgedistill.check_specs import Check, SqlExecutionCheck
from edgedistill.checks import Checker, check_identity, make_checker
from edgedistill.checks.cleaning import answer_source, clean_answer
from edgedistill.checks.sql import has_top_level_order_by
from edgedistill.checks.text import rouge_l
from edgedistill.errors import DatasetError
from edgedistill.recipe import CurateSpec

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
LATER = "SELECT name FROM t ORDER BY id"


def check(**spec: object) -> Checker:
    return make_checker(TypeAdapter[Check](Check).validate_python(spec))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "100% of #1? é.db"  # every character that a URI could take amiss
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (id INTEGER, name TEXT, score REAL)")
        rows = [(1, "a", 1.0), (2, "b", 0.1), (3, "c", 0.2), (4, None, None)]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
    return path


@pytest.fixture
def sql(database: Path) -> Checker:
    """With time for every query that ends: a busy machine must not make one invalid."""
    return check(kind="sql-execution", database=database, timeout_seconds=60)


@pytest.fixture
def impatient(database: Path) -> Checker:
    return check(kind="sql-execution", database=database, timeout_seconds=0.2)


def test_a_database_counts_by_its_content_not_by_its_path(database: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.db"
    copy.write_bytes(database.read_bytes())
    here, there = (SqlExecutionCheck(kind="sql-execution", database=p) for p in (database, copy))
    assert check_identity(here) == check_identity(there)
    copy.write_bytes(b"other")
    assert check_identity(here) != check_identity(there)


@pytest.mark.parametrize(
    ("answer", "teacher", "same"),
    [
        ("SELECT id FROM t", "select t.id as other from t;", True),
        ("SELECT id FROM t WHERE id < 3", "SELECT id FROM t", False),
        ("SELECT id, name FROM t", "SELECT id FROM t", False),
        ("SELECT id FROM t WHERE 0", "SELECT id FROM t WHERE id > 9", True),
        ("SELECT id, id FROM t WHERE 0", "SELECT id FROM t WHERE 0", False),
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t", True),
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t ORDER BY id", False),
        ("SELECT id FROM t", "SELECT id FROM (SELECT id FROM t ORDER BY id DESC)", True),
        ("SELECT 1 UNION ALL SELECT 1", "SELECT 1", False),
        ("SELECT 3", "SELECT 3.0", True),
        ("SELECT 1234567891", "SELECT 1234567891.0", True),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT 0.3000001", "SELECT 0.3", False),
        ("SELECT 2.9999999999", "SELECT 3", True),
        ("SELECT '3'", "SELECT 3", False),
        ("SELECT 'A'", "SELECT 'a'", False),
        ("SELECT NULL", "SELECT 0", False),
        ("SELECT x'61'", "SELECT 'a'", False),
        ("SELEC 1", "SELECT 1", False),
        ("SELEC 1", "SELEC 1", False),
        ("WITH a AS (SELECT 1) SELECT * FROM a", "-- one\nSELECT 1", True),
    ],
)
def test_queries_agree_by_what_they_give(
    sql: Checker, answer: str, teacher: str, same: bool
) -> None:
    assert sql.same(answer, teacher) is same


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "not a SELECT query"),
        ("There are 5.", "not a SELECT query"),
        ("SELEC 1", "not a SELECT query"),
        ("SELECT nope FROM t", "no such column: nope"),
        ("SELECT * FROM u", "no such table: u"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
        ("SELECT 1; DELETE FROM t", "one statement at a time"),
        ("DELETE FROM t", "not a SELECT query"),
        ("/* SELECT */ DELETE FROM t", "not a SELECT query"),
        ("WITH a AS (SELECT 1) DELETE FROM t", "not authorized"),
        ("WITH a AS (SELECT 1) INSERT INTO t SELECT 1, 2, 3", "not authorized"),
        ("ATTACH 'other.db' AS o", "not a SELECT query"),
        ("PRAGMA query_only = OFF", "not a SELECT query"),
        ("SELECT * FROM pragma_table_info('t')", "not authorized"),
        ("EXPLAIN SELECT 1", "not a SELECT query"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT id FROM t ORDER BY random()", "not authorized"),
        ("SELECT ?", "number of bindings"),
        ("SELECT 1\0", "null character"),
        (ENDLESS + "SELECT x FROM n", "gives more than 10,000 rows"),
        ("SELECT hex(zeroblob(900000000))", "too big"),
    ],
)
def test_what_is_no_valid_query(sql: Checker, database: Path, answer: str, why: str) -> None:
    before = database.read_bytes()
    assert why in (sql.invalid(answer) or "")
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]


def test_a_query_without_end_is_ended(impatient: Checker) -> None:
    assert impatient.invalid(ENDLESS + "SELECT COUNT(*) FROM n") == "runs longer than 0.2 s"


def test_valid_query_has_no_error(sql: Checker) -> None:
    assert sql.invalid("SELECT name, AVG(score) FROM t GROUP BY name") is None


def test_result_of_a_query_is_remembered(sql: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sql.same("SELECT 1", "SELECT 2 - 1")
    monkeypatch.delattr("edgedistill.checks.sql._connect")
    assert sql.same("SELECT 1", "SELECT 2 - 1")
    with pytest.raises(NameError):
        sql.same("SELECT 1", "SELECT 3 - 2")


@pytest.mark.parametrize("content", [None, b"this is no database, whatever its name says" * 50])
def test_database_that_cannot_be_used(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match="database cannot be used"):
        check(kind="sql-execution", database=path)
    assert path.exists() is (content is not None)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT 1", False),
        ("SELECT id FROM t order  by id", True),
        ("SELECT id FROM t ORDER /* how */ BY id", True),
        ("SELECT id FROM t UNION SELECT 2 ORDER BY 1", True),
        ("SELECT id FROM (SELECT id FROM t ORDER BY id)", False),
        ("SELECT RANK() OVER (ORDER BY id) FROM t", False),
        ("SELECT id FROM t WHERE name = 'x) ORDER BY y'", False),
        ("SELECT id -- ORDER BY id\nFROM t", False),
        ('SELECT "ORDER BY" FROM t GROUP BY 1', False),
        ("SELECT '(' FROM t ORDER BY id", True),
    ],
)
def test_top_level_order_by(query: str, ordered: bool) -> None:
    assert has_top_level_order_by(query) is ordered


@pytest.mark.parametrize(
    ("kind", "answer", "teacher", "same"),
    [
        ("exact", " Yes\n", "Yes", True),
        ("exact", "yes", "Yes", False),
        ("exact", "", "", False),
        ("label", " **Urgent**. ", "urgent", True),
        ("label", "very  urgent", "Very urgent", True),
        ("label", "urgent", "normal", False),
        ("label", "C++", "C", False),
        ("json", '{"a": 1, "b": [1, 2.0]}', '{"b":[1,2],"a":1.0}', True),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", "true", "1", False),
        ("json", '{"a": "X"}', '{"a": "x"}', False),
        ("json", "{", "{", False),
        ("json", "NaN", "NaN", False),
        ("number", "It is 1,234.5.", "so: 1234.50", True),
        ("number", "first 3, then 4", "4", True),
        ("number", "-4", "4", False),
        ("number", "\N{MINUS SIGN}4", "-4", True),
        ("number", "10-4", "4", True),
        ("number", "1e3", "1000", True),
        ("number", "100.00001", "100", True),
        ("number", "100.1", "100", False),
        ("number", "none", "none", False),
        ("regex", "so: Answer:  B ", "ANSWER: b", True),
        ("regex", "answer: a, no, answer: b", "answer: b", True),
        ("regex", "answer: c", "answer: b", False),
        ("regex", "b", "answer: b", False),
        ("rouge", "The cat sat on the mat.", "the cat lay on the mat", True),
        ("rouge", "on the mat the cat sat", "the cat sat on the mat", False),
        ("rouge", "...", "...", False),
    ],
)
def test_texts_agree(kind: str, answer: str, teacher: str, same: bool) -> None:
    given = {"regex": {"pattern": r"answer:\s*(\w)"}}.get(kind, {})
    assert check(kind=kind, **given).same(answer, teacher) is same


@pytest.mark.parametrize(
    ("kind", "answer", "why"),
    [
        ("exact", "  ", "empty"),
        ("label", "...", "empty"),
        ("label", "blue", "not one of the labels: 'blue'"),
        ("json", "{'a': 1}", "not JSON"),
        ("number", "H2O", "holds no number"),
        ("rouge", "?!", "has no word"),
    ],
)
def test_invalid_texts(kind: str, answer: str, why: str) -> None:
    given = {"labels": ("red", "green")} if kind == "label" else {}
    assert why in (check(kind=kind, **given).invalid(answer) or "")


def test_allowed_label_is_valid_and_described() -> None:
    checker = check(kind="label", labels=("Red", "green"))
    assert checker.invalid("RED!") is None
    assert "Allowed labels: Red, green." in checker.description


def test_tolerance_is_described_and_used() -> None:
    checker = check(kind="number", tolerance=0.1)
    assert "0.1" in checker.description
    assert checker.same("95", "100")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  SELECT 1\n", "SELECT 1"),
        ("Here:\n```sql\nSELECT 1\n```\nor\n```\nSELECT 2\n```", "SELECT 1"),
        ("```SELECT 1```", "SELECT 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("SELECT 1;", "SELECT 1;"),
    ],
)
def test_fence_is_stripped(text: str, cleaned: str) -> None:
    assert clean_answer(text, CurateSpec()) == cleaned


def test_fence_stays_when_not_asked() -> None:
    assert clean_answer("```\nx\n```", CurateSpec(strip_code_fence=False)) == "```\nx\n```"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("SELECT\n  1,\t2", "SELECT 1, 2"),
        ("SELECT 'a  b''\n c'\nFROM   t", "SELECT 'a  b''\n c' FROM t"),
        ("SELECT 1 -- one\nFROM t", "SELECT 1 -- one\nFROM t"),
        ("it's\nfine", "it's fine"),
    ],
)
def test_whitespace_is_collapsed_outside_of_literals(text: str, cleaned: str) -> None:
    assert clean_answer(text, CurateSpec(collapse_whitespace=True)) == cleaned
    assert clean_answer(text, CurateSpec()) == text


@pytest.mark.parametrize("joins", [False, True])
def test_each_byte_of_an_answer_comes_from_the_text(joins: bool) -> None:
    chance, spec = random.Random(0), CurateSpec(collapse_whitespace=joins)
    bits = ("```", "```sql\n", " ", "\n", "\t", "'", "a", "bé", "--", "中", "\u3000", ";")
    for _ in range(2000):
        text = "".join(chance.choice(bits) for _ in range(chance.randrange(12)))
        answer, source = clean_answer(text, spec).encode(), answer_source(text, spec)
        assert len(source.starts) == len(answer)
        assert all(a < b for a, b in itertools.pairwise([*source.starts, source.stop]))
        for byte, at in zip(answer, source.starts, strict=True):
            same = source.raw[at] == byte
            assert same or (joins and byte == 32 and source.raw[at:].decode()[0].isspace())


def test_a_pattern_and_its_first_group() -> None:
    whole, group = (check(kind="regex", pattern=p) for p in (r"\d+ eur", r"(\d+) eur"))
    assert not whole.same("5 EUR", "5  eur")
    assert group.same("about 5 EUR", "3 eur or 5 eur")
    assert whole.invalid("5 usd") == "the pattern is not found"
    assert not check(kind="regex", pattern="yes", ignore_case=False).same("YES", "yes")
    with pytest.raises(ValidationError, match="no regular expression: missing \\)"):
        check(kind="regex", pattern="(a")


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b c", "a b c d e", 0.75),
        ("", "", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, f1: float) -> None:
    assert rouge_l(answer, reference) == rouge_l(reference, answer) == pytest.approx(f1)
