"""A loopback server for one page that works for us: it asks for jobs and sends back results."""

from __future__ import annotations

import json
import queue
import secrets
import shutil
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
POLL_SECONDS = 10.0  # a job's request waits so long before it is told that there is none yet

File = bytes | Path


class PageFailed(Exception):
    """The page's own words about what went wrong."""


class JobServer:
    """`files` by their path below `url`; jobs go to the page, its results come back. Threads of
    its own; a context manager. The URL holds a secret, so no other page can reach it."""

    def __init__(self, files: Mapping[str, File]) -> None:
        self._jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[bytes | PageFailed] = queue.SimpleQueue()
        secret = secrets.token_urlsafe(16)
        served = {f"/{secret}/{name}": file for name, file in files.items()}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == f"/{secret}/job":
                    outer._give_job(self)
                else:
                    _send(self, served.get(path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kind = self.path.removeprefix(f"/{secret}/")
                if kind == "failed":
                    outer._done.put(PageFailed(body.decode("utf-8", "replace")))
                elif kind == "done":
                    outer._done.put(body)
                _answer(self, 204 if kind in ("failed", "done") else 404)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/{secret}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def put(self, job: Mapping[str, Any]) -> None:
        """The page's next job."""
        self._jobs.put(json.dumps(job).encode())

    def result(self, seconds: float) -> bytes | None:
        """What the page sent next, or None when nothing came within `seconds`.

        Raises:
            PageFailed: the page sent an error instead.
        """
        try:
            done = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(done, PageFailed):
            raise done
        return done

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> JobServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _give_job(self, handler: BaseHTTPRequestHandler) -> None:
        try:
            body = self._jobs.get(timeout=POLL_SECONDS)
        except queue.Empty:
            _answer(handler, 204)
            return
        _answer(handler, 200, len(body), TYPES[".json"])
        handler.wfile.write(body)


def _answer(handler: BaseHTTPRequestHandler, status: int, size: int = 0, kind: str = "") -> None:
    handler.send_response(status)
    if kind:
        handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(size))
    handler.send_header("Cache-Control", "no-store")
    handler.end_headers()


def _send(handler: BaseHTTPRequestHandler, file: File | None) -> None:
    if file is None:
        _answer(handler, 404)
        return
    kind = TYPES.get(Path(handler.path.partition("?")[0]).suffix, "application/octet-stream")
    if isinstance(file, bytes):
        _answer(handler, 200, len(file), kind)
        handler.wfile.write(file)
        return
    with file.open("rb") as stream:
        _answer(handler, 200, file.stat().st_size, kind)
        shutil.copyfileobj(stream, handler.wfile, 1 << 20)
