"""A model hub on loopback: what huggingface_hub asks of one, answered over real HTTP.

It knows one repository at one revision; which trouble it makes is set from outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlparse

REPO, REVISION, TOKEN = "example/Tiny-2M-Instruct", "0123456789abcdef" * 2 + "01234567", "hf_tiny"


@dataclass
class Hub:
    """`files` by name. `gated`: only for TOKEN. `cuts`: bytes after which the next answer with a
    file of that name breaks off, once. `asked`: (method, path, Range header) of every request."""

    files: dict[str, bytes]
    url: str = ""
    gated: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)

    def fetched(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET"]

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            sha1 = hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": sha1}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": REPO, "sha": REVISION, "siblings": siblings, "private": False}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = urlparse(self.path).path
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if f"/{REPO}/" not in f"{path}/":
                return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
            if REVISION not in path:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if path.startswith("/api/"):
                return self.send(200, json.dumps(hub.listing()).encode(), {})
            if hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
            return self.file(path.rsplit("/", 1)[1])

        def file(self, name: str) -> None:
            if name not in hub.files:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = hub.files[name]
            told = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            data = bytes(len(data)) if name in hub.lies else data
            if name.endswith(".safetensors"):
                told |= {"X-Linked-Etag": told["ETag"], "X-Linked-Size": str(len(data))}
            start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            whole = len(data)
            if start:
                told["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            return self.send(206 if start else 200, data[start:], told, hub.cuts.get(name))

        def send(
            self, status: int, data: bytes, more: dict[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if cut is not None:
                    del hub.cuts[urlparse(self.path).path.rsplit("/", 1)[1]]
                    self.wfile.write(data[:cut])
                    self.close_connection = True
                    return
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
