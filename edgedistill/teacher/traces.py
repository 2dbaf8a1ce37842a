"""The trace store: every answer a workspace ever paid for, in one SQLite database.

Keyed by the hash of the request. Safe against kill -9 (WAL, `synchronous=FULL`: a put is on disk
when it returns) and against two builds at once.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from edgedistill.artifacts import canonical
from edgedistill.errors import ArtifactError, StorageError
from edgedistill.teacher.client import Trace

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS traces (
  key TEXT PRIMARY KEY, -- sha256 of the request
  failure TEXT,         -- NULL when answered
  body TEXT NOT NULL    -- the whole trace as JSON
) WITHOUT ROWID
"""
# The first answer stays, whoever asks again: what was built from it must not change.
PUT = """
INSERT INTO traces (key, failure, body) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET failure = excluded.failure, body = excluded.body
WHERE traces.failure IS NOT NULL
"""


class TraceStore:
    """A context manager; one object may be used from many threads.

    Raises (every method):
        ArtifactError: the file is not a trace database, or of a newer edgedistill.
        StorageError: no space, no permission, or locked for longer than 30 s.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with _translated(path):
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def get(self, key: str) -> Trace | None:
        """The answer, or the failure, kept for a request."""
        with self._lock, _translated(self.path):
            row = self._database.execute("SELECT body FROM traces WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            return Trace(**json.loads(row[0]))
        except (TypeError, ValueError) as error:
            raise _not_ours(self.path, f"a trace in it cannot be read ({error})") from error

    def put(self, trace: Trace) -> None:
        """Keep a trace; durable on return. A failure gives way, an answer stays."""
        # Half a surrogate pair, which JSON can escape, is no text that SQLite could hold.
        body = canonical(trace.to_json()).encode("utf-8", "replace").decode("utf-8")
        values = (trace.key, trace.failure, body)
        with self._lock, _translated(self.path):
            self._database.execute(PUT, values)

    def _prepare(self) -> None:
        self._write_ahead()
        self._database.execute("PRAGMA synchronous=FULL")
        if self._version() == SCHEMA_VERSION:
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            found = self._version()
            tables = self._database.execute("SELECT name FROM sqlite_master").fetchall()
            if found > SCHEMA_VERSION:
                raise _not_ours(self.path, f"its schema is version {found}, of a newer edgedistill")
            if found == 0 and tables:
                raise _not_ours(self.path, f"it is a database of something else ({tables[0][0]})")
            self._database.execute(SCHEMA)
            self._database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise

    def _write_ahead(self) -> None:
        """SQLite does not wait for its busy timeout while the journal mode changes."""
        last = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > last:
                    raise
                time.sleep(0.02)

    def _version(self) -> int:
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        hint = "free some space or make the folder writable; answers so far are kept"
        if _is_busy(error):
            hint = "another build holds it; wait for it to end, then run this again"
        raise StorageError(f"the trace store: {error}", where=str(path), hint=hint) from error
    except sqlite3.DatabaseError as error:
        raise _not_ours(path, str(error)) from error
    except OSError as error:
        raise StorageError(f"the trace store: {error.strerror}", where=str(path)) from error


def _not_ours(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"this is not a trace store that can be used: {why}",
        where=str(path),
        hint="move the file away (it may hold paid answers), or choose another --workspace",
    )
