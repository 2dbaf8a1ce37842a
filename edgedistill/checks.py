"""How two answers are compared on a task, and what is cleaned off an answer first.

A check says whether an answer is valid by itself, and whether it says the same as the teacher's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, assert_never

from edgedistill.artifacts import digest_of_file
from edgedistill.errors import DatasetError
from edgedistill.recipe import Check, CurateSpec, SqlExecutionCheck
from edgedistill.spelling import Part, Source

MAX_ROWS = 10_000
MAX_COLUMNS = 100
MAX_VALUE_BYTES = 1_000_000
STEPS_BETWEEN_LOOKS = 1000
CACHED_RESULTS = 4096


class Checker(Protocol):
    """`description` tells in words, for reports, what counts as the same."""

    description: str

    def invalid(self, answer: str) -> str | None:
        """Why the answer cannot be one at all, or None."""

    def same(self, answer: str, teacher: str) -> bool:
        """Whether the answer says what the teacher's says; never true for an invalid one."""


def make_checker(spec: Check) -> Checker:
    """The checker of a recipe's `check`.

    Raises:
        DatasetError: the SQL check's database cannot be opened.
    """
    if isinstance(spec, SqlExecutionCheck):
        return SqlExecutionChecker(spec.database, spec.timeout_seconds)
    if spec.kind == "exact":
        return ExactChecker()
    if spec.kind == "label":
        return LabelChecker(spec.labels)
    if spec.kind == "json":
        return JsonChecker()
    if spec.kind == "number":
        return NumberChecker(spec.tolerance)
    assert_never(spec.kind)


def check_identity(spec: Check) -> dict[str, Any]:
    """What of a check decides its verdicts: a file counts by its content, not by its path."""
    values = spec.model_dump()
    return {k: digest_of_file(v) if isinstance(v, Path) else v for k, v in values.items()}


_FENCE = re.compile(r"```(?:[\w+.-]*[ \t]*\r?\n)?(.*?)(?:```|\Z)", re.DOTALL)
# A line comment keeps the line break that ends it: joined, it would swallow what follows.
_LITERAL = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
_KEPT_OR_SPACE = re.compile(rf"(?P<kept>{_LITERAL}|--[^\n]*\n?|/\*.*?\*/)|\s+", re.DOTALL)


def clean_answer(text: str, spec: CurateSpec) -> str:
    """The answer without what surrounds it: white space, and, where the spec asks for it, a code
    fence (the first one counts) and line breaks (but none inside a SQL literal or comment)."""
    parts, _ = _parts(text, spec)
    return "".join(" " if part.joined else text[part.start : part.stop] for part in parts)


def answer_source(text: str, spec: CurateSpec) -> Source:
    """Where the bytes of `clean_answer(text, spec)` come from in `text`."""
    parts, fenced = _parts(text, spec)
    return Source(
        text,
        parts,
        joins=spec.collapse_whitespace,
        unfences=spec.strip_code_fence,
        fenced=fenced,
    )


def _parts(text: str, spec: CurateSpec) -> tuple[list[Part], bool]:
    """What is kept of a text, and whether a code fence held it."""
    start, stop = _stripped(text, 0, len(text))
    fence = _FENCE.search(text, start, stop) if spec.strip_code_fence else None
    if fence is not None:
        start, stop = _stripped(text, *fence.span(1))
    if start == stop or not spec.collapse_whitespace:
        return [Part(start, stop)] if start < stop else [], fence is not None
    parts, at = [], start
    for found in _KEPT_OR_SPACE.finditer(text, start, stop):
        literal = found["kept"] is not None
        parts += [Part(at, found.start())] if at < found.start() else []
        parts.append(Part(*found.span(), joined=not literal, literal=literal))
        at = found.end()
    return [*parts, *([Part(at, stop)] if at < stop else [])], fence is not None


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    """The same range of a text without white space at both ends."""
    whole = text[start:stop]
    left = len(whole) - len(whole.lstrip())
    return start + left, start + left + len(whole.strip())


class ExactChecker:
    """The same characters."""

    description = "Same text, character for character, after white space at both ends is removed."

    def invalid(self, answer: str) -> str | None:
        return None if answer.strip() else "empty"

    def same(self, answer: str, teacher: str) -> bool:
        return self.invalid(teacher) is None and answer.strip() == teacher.strip()


class LabelChecker:
    """One of a few words."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = {_label(label) for label in labels}
        allowed = f" Allowed labels: {', '.join(labels)}." if labels else ""
        self.description = (
            "Same label: case, white space, and punctuation at both ends do not count." + allowed
        )

    def invalid(self, answer: str) -> str | None:
        label = _label(answer)
        if not label:
            return "empty"
        if self._labels and label not in self._labels:
            return f"not one of the labels: {label[:60]!r}"
        return None

    def same(self, answer: str, teacher: str) -> bool:
        return self.invalid(teacher) is None and _label(answer) == _label(teacher)


# Not + - # and the like: C, C++ and C# are three labels.
_AROUND_LABELS = " \t\r\n.,;:!?\"'`*()[]{}"


def _label(text: str) -> str:
    return " ".join(text.strip(_AROUND_LABELS).casefold().split())


class JsonChecker:
    """The same JSON value."""

    description = (
        "Same JSON value: the order of object keys and white space do not count, numbers compare "
        "by value, the order of lists and the case of strings count."
    )

    def invalid(self, answer: str) -> str | None:
        try:
            _parse_json(answer)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        return None

    def same(self, answer: str, teacher: str) -> bool:
        try:
            return bool(_comparable(_parse_json(answer)) == _comparable(_parse_json(teacher)))
        except (ValueError, RecursionError):
            return False


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _comparable(value: Any) -> Any:
    """Marks booleans, which Python takes for the numbers 0 and 1."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return value


_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


class NumberChecker:
    """The last number of a text."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self.description = (
            "Same number: the last one in the text counts, commas between thousands are dropped, "
            f"and a relative difference up to {tolerance:g} is the same."
        )

    def invalid(self, answer: str) -> str | None:
        return "holds no number" if _last_number(answer) is None else None

    def same(self, answer: str, teacher: str) -> bool:
        ours, theirs = _last_number(answer), _last_number(teacher)
        if ours is None or theirs is None:
            return False
        return math.isclose(ours, theirs, rel_tol=self._tolerance, abs_tol=0.0)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None


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


_SQL_TOKEN = re.compile(rf"{_LITERAL}|`[^`]*`|\[[^\]]*\]|{_COMMENT}|[()]|\w+", re.DOTALL)


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
