"""Queries agree by the rows they give on a database that nothing can be written to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.checks.cleaning import LITERAL
from edgedistill.errors import DatasetError

MAX_ROWS = 10_000
MAX_COLUMNS = 100
MAX_VALUE_BYTES = 1_000_000
STEPS_BETWEEN_LOOKS = 1000
CACHED_RESULTS = 4096


@dataclass(frozen=True)
class _Result:
    """What a query gives, as digests: many results are remembered, and some are large."""

    error: str | None
    columns: int = 0
    as_list: bytes = b""
    as_multiset: bytes = b""


class SqlExecutionChecker:
    """Executes both queries on one SQLite database that nothing can be written to."""

    def __init__(self, database: Path, timeout_seconds: float) -> None:
        self._database = database
        self._timeout_seconds = timeout_seconds
        self._result: Callable[[str], _Result] = functools.lru_cache(CACHED_RESULTS)(self._execute)
        self.description = (
            "Both queries run on the same read-only database and give the same number of columns "
            "and the same rows, in the same order if the teacher's query has an ORDER BY of its "
            "own, in any order otherwise; column names do not count, numbers compare by value to "
            f"9 significant digits. One SELECT each, at most {MAX_ROWS:,} rows and "
            f"{timeout_seconds:g} s."
        )
        self._must_open()

    def invalid(self, answer: str) -> str | None:
        return self._result(answer).error

    def same(self, answer: str, teacher: str) -> bool:
        theirs, ours = self._result(teacher), self._result(answer)
        if theirs.error is not None or ours.error is not None or ours.columns != theirs.columns:
            return False
        if has_top_level_order_by(teacher):
            return ours.as_list == theirs.as_list
        return ours.as_multiset == theirs.as_multiset

    def _must_open(self) -> None:
        try:
            with contextlib.closing(_connect(self._database)) as connection:
                connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise DatasetError(
                f"the check's database cannot be used: {error}",
                where=str(self._database),
                hint="`check.database` in the recipe must name a SQLite file",
            ) from error

    def _execute(self, query: str) -> _Result:
        if not _starts_as_query(query):
            return _Result("not a SELECT query")
        deadline = time.monotonic() + self._timeout_seconds
        with contextlib.closing(_connect(self._database)) as connection:
            connection.set_authorizer(_only_reading)
            connection.set_progress_handler(
                lambda: int(time.monotonic() > deadline), STEPS_BETWEEN_LOOKS
            )
            try:
                cursor = connection.execute(query)
                rows = [_row_digest(row) for row in itertools.islice(cursor, MAX_ROWS + 1)]
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                if time.monotonic() > deadline:
                    return _Result(f"runs longer than {self._timeout_seconds:g} s")
                return _Result(str(error))
            columns = len(cursor.description or ())
        if len(rows) > MAX_ROWS:
            return _Result(f"gives more than {MAX_ROWS:,} rows")
        return _Result(None, columns, _digest(rows), _digest(sorted(rows)))


def _connect(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    # One step of a query can build a huge value, and no progress handler runs inside a step.
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
    return connection


_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
_FORBIDDEN_FUNCTIONS = {"load_extension", "random", "randomblob"}


def _only_reading(
    action: int, first: str | None, second: str | None, database: str | None, source: str | None
) -> int:
    """SQLite asks this for everything a statement would do; a result of chance compares to none."""
    if action in _READING:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


_COMMENT = r"--[^\n]*|/\*.*?(?:\*/|\Z)"
_QUERY_START = re.compile(rf"(?:\s|{_COMMENT})*(?:SELECT|WITH)\b", re.IGNORECASE | re.DOTALL)


def _starts_as_query(query: str) -> bool:
    """EXPLAIN reads only, but what it gives is no answer."""
    return _QUERY_START.match(query) is not None


def _value(value: Any) -> Any:
    """3.0 and 3 are one number, and so are floats with the same first 9 significant digits."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    if value.is_integer():
        return int(value)
    rounded = float(f"{value:.9g}")
    return int(rounded) if rounded.is_integer() else rounded


def _row_digest(row: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(repr(tuple(map(_value, row))).encode("utf-8", "surrogatepass")).digest()


def _digest(rows: Iterable[bytes]) -> bytes:
    return hashlib.sha256(b"".join(rows)).digest()


_SQL_TOKEN = re.compile(rf"{LITERAL}|`[^`]*`|\[[^\]]*\]|{_COMMENT}|[()]|\w+", re.DOTALL)


def has_top_level_order_by(query: str) -> bool:
    """Whether the rows of the whole query are ordered, not those of a subquery or a window."""
    depth, before = 0, ""
    for token in _SQL_TOKEN.findall(query):
        word = token.upper()
        if word == "(":
            depth += 1
        elif word == ")":
            depth -= 1
        elif word == "BY" and before == "ORDER" and depth == 0:
            return True
        if not token.startswith(("--", "/*")):
            before = word
    return False
