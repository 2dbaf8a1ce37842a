"""The trace store: durable, shared, and honest about files that are none."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from edgedistill.errors import ArtifactError, StorageError
from edgedistill.teacher.client import Trace
from edgedistill.teacher.traces import TraceStore

TRACE = Trace(
    trace_id="t", key="k", prompt_id="p", purpose="collect", model_asked="m", model_answered="m2",
    prompt_version="v", parameters={"seed": 1}, prompt_tokens=1, completion_tokens=2,
    latency_seconds=0.5, time_to_first_token=None, text="caf\u00e9 \u2028", finish_reason="stop",
    top_logprobs=None, attempts=1, failure=None, asked_at="2026-01-01T00:00:00Z",
)  # fmt: skip
FAILED = replace(TRACE, text="", failure="no answer in time")

WRITER = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_traces import TRACE
from edgedistill.teacher.traces import TraceStore
with TraceStore(Path(sys.argv[1])) as store:
    for number in range(20):
        store.put(replace(TRACE, key=f"{sys.argv[3]}-{number}"))
    os.kill(os.getpid(), 9)
"""


def test_put_get_and_reopen(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "deep" / "traces.db") as store:
        assert store.get("k") is None
        store.put(TRACE)
        assert store.get("k") == TRACE
    with TraceStore(tmp_path / "deep" / "traces.db") as store:
        assert store.get("k") == TRACE


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (FAILED, TRACE, TRACE),
        (TRACE, FAILED, TRACE),
        (TRACE, replace(TRACE, text="later"), TRACE),
        (FAILED, replace(FAILED, attempts=5), replace(FAILED, attempts=5)),
    ],
)
def test_the_first_answer_stays(tmp_path: Path, first: Trace, second: Trace, kept: Trace) -> None:
    with TraceStore(tmp_path / "traces.db") as store:
        store.put(first)
        store.put(second)
        assert store.get("k") == kept


def test_text_that_no_file_could_hold(tmp_path: Path) -> None:
    with TraceStore(tmp_path / "traces.db") as store:
        store.put(replace(TRACE, model_answered="\ud800"))
        kept = store.get("k")
    assert kept is not None
    assert kept.model_answered == "?"


def test_settings_that_survive_a_crash(tmp_path: Path) -> None:
    TraceStore(tmp_path / "traces.db").close()
    with sqlite3.connect(tmp_path / "traces.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX signal")
def test_two_processes_at_once_both_killed(tmp_path: Path) -> None:
    path = tmp_path / "traces.db"
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", WRITER, str(path), here]
    children = [subprocess.Popen([*command, name], cwd=here + "/..") for name in ("a", "b")]
    assert [child.wait(60) for child in children] == [-9, -9]
    with TraceStore(path) as store:
        assert all(store.get(f"{name}-{n}") for name in ("a", "b") for n in range(20))


def test_many_openers_and_threads(tmp_path: Path) -> None:
    def use(number: int) -> bool:
        with TraceStore(tmp_path / "traces.db") as store:
            store.put(replace(TRACE, key=str(number)))
            return store.get(str(number)) is not None

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(24)))


def _text(path: Path) -> None:
    path.write_text("these are notes, and not a database " * 30)


def _other(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (id)")


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=9")


@pytest.mark.parametrize(
    ("make", "part"), [(_text, "not a database"), (_other, "songs"), (_newer, "newer edgedistill")]
)
def test_a_file_that_is_no_store(tmp_path: Path, make: object, part: str) -> None:
    path = tmp_path / "traces.db"
    assert callable(make)
    make(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=part):
        TraceStore(path)
    assert path.read_bytes()[100:] == before[100:]


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "traces.db").mkdir()
    with pytest.raises(StorageError, match=r"traces\.db"):
        TraceStore(tmp_path / "traces.db")
