"""What a build does once for each prompt or answer: store, read, check, curate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgedistill.artifacts import TokenMixEntry
from edgedistill.check_specs import PythonCheck, SqlExecutionCheck, TextCheck
from edgedistill.checks import make_checker
from edgedistill.checks.own import PythonChecker
from edgedistill.curate import select
from edgedistill.progress import Silent
from edgedistill.recipe import CurateSpec
from edgedistill.splitting import split
from edgedistill.teacher.client import Trace
from edgedistill.teacher.traces import TraceStore
from edgedistill.tokenmix import TokenMix, read_token_mix

ROOT = Path(__file__).resolve().parents[2]
TICKETS = ROOT / "recipes" / "support-sql" / "tickets.db"
PUTS, GETS, STORED, PROMPTS, CALLS = 20, 200, 2_000, 3_000, 100
ANSWER = "SELECT priority, count(*) FROM tickets WHERE status = 'open' GROUP BY priority " * 6
TRACE = Trace(
    trace_id="t", key="k", prompt_id="p", purpose="collect", model_asked="m", model_answered="m",
    prompt_version="v", parameters={"temperature": 0.0, "max_tokens": 256}, prompt_tokens=400,
    completion_tokens=120, latency_seconds=0.5, time_to_first_token=0.1, text=ANSWER,
    finish_reason="stop", top_logprobs=None, attempts=1, failure=None,
    asked_at="2026-01-01T00:00:00Z",
)  # fmt: skip
OWN_CHECK = "def same(answer, teacher):\n    return answer == teacher\n"
QUERIES = (
    "SELECT count(*) FROM tickets",
    "SELECT status, count(*) FROM tickets GROUP BY status ORDER BY status",
    "SELECT * FROM tickets ORDER BY id LIMIT 50",
    "SELECT a.id FROM tickets a JOIN tickets b ON a.id = b.id WHERE a.status = 'open'",
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TraceStore]:
    with TraceStore(tmp_path / "traces.db") as held:
        yield held


def test_trace_puts(benchmark: Any, store: TraceStore) -> None:
    """20 answers, each on disk before the next."""
    keys = map(str, itertools.count())

    def put() -> None:
        for key in itertools.islice(keys, PUTS):
            store.put(replace(TRACE, key=key))

    benchmark(put)
    assert store.get("0") is not None


def test_trace_gets(benchmark: Any, store: TraceStore) -> None:
    """200 of 2,000 answers by their keys."""
    for number in range(STORED):
        store.put(replace(TRACE, key=str(number)))
    keys = [str(number) for number in range(0, STORED, STORED // GETS)]
    found = benchmark(lambda: [store.get(key) for key in keys])
    assert None not in found


def test_token_mix_read(benchmark: Any, tmp_path: Path) -> None:
    """3,000 lines of JSON."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"id": e.id, "messages": e.messages, "tags": e.tags} for e in _entries()]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    assert len(benchmark(read_token_mix, file).entries) == PROMPTS


def test_curate(benchmark: Any) -> None:
    """3,000 answers: cleaned, checked, a tenth of them doubles, and split by phrasing."""
    entries = _entries()
    mix, checker = TokenMix(entries, "d"), make_checker(TextCheck(kind="json"))
    traces = {entry.id: _answered(entry, number) for number, entry in enumerate(entries)}
    spec = CurateSpec()

    def curated() -> int:
        rows, rejected = select(traces, mix, spec, checker, Silent())
        split(rows, spec.split)
        return len(rejected)

    # 60 are no JSON, and 240 repeat a prompt whose answer is kept.
    assert benchmark(curated) == 300


def test_sql_execution(benchmark: Any) -> None:
    """Four pairs of queries on the recipe's database; none is remembered from before."""
    spec = SqlExecutionCheck(kind="sql-execution", database=TICKETS)

    def compared() -> list[bool]:
        checker = make_checker(spec)
        return [checker.same(query, f"{query} -- again") for query in QUERIES]

    assert benchmark(compared) == [True] * len(QUERIES)


def test_child_round_trips(benchmark: Any, tmp_path: Path) -> None:
    """100 requests to a process of its own, one behind the other."""
    file = tmp_path / "own.py"
    file.write_text(OWN_CHECK, "utf-8")
    checker = make_checker(PythonCheck(kind="python", file=file))
    assert isinstance(checker, PythonChecker)
    try:
        found = benchmark(lambda: [checker.same("a", "a") for _ in range(CALLS)])
    finally:
        checker.close()
    assert all(found)


def _entries() -> tuple[TokenMixEntry, ...]:
    """Of each ten the last says what the first says, in other letters."""
    return tuple(
        TokenMixEntry(
            f"p{number}",
            ({"role": "user", "content": _said(number)},),
            tags=(f"phrasing:{number % 40}",),
        )
        for number in range(PROMPTS)
    )


def _said(number: int) -> str:
    about = number - 9 if number % 10 == 9 else number
    text = f"How many tickets of customer {about} were closed in week {about % 52}, by priority?"
    return text.upper() if about != number else text


def _answered(entry: TokenMixEntry, number: int) -> dict[str, Any]:
    """Every fiftieth is no JSON."""
    text = "sorry" if number % 50 == 0 else f'```json\n{{"customer": {number}, "n": [1, 2]}}\n```'
    return {
        "trace_id": f"t{number}", "prompt_id": entry.id, "text": text, "finish_reason": "stop",
        "failure": None,
    }  # fmt: skip
