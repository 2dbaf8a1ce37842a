"""wllama, llama.cpp for browsers: one pinned npm package, fetched once and checked by its hash.

Version 2 and not 3: it has calls for single tokens and their probabilities, which measuring needs,
a build that no cross-origin headers are needed for, and it never looks for files on another host.
Of version 2 the last one with 32-bit memory, which every browser with WebAssembly SIMD runs.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedistill.artifacts import storing, write_atomic
from edgedistill.errors import MissingTool
from edgedistill.progress import Progress
from edgedistill.weights import CACHE_VARIABLE, cache_folder

REGISTRY_VARIABLE = "npm_config_registry"  # npm's own
REGISTRY = "https://registry.npmjs.org"
FETCH_SECONDS = 60
LARGEST_BYTES = 32 << 20


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry; `members` maps a name of ours to a path in its tarball."""

    name: str
    version: str
    integrity: str  # "sha512-" and base64, as package-lock.json has it
    licence: str
    members: Mapping[str, str]

    @property
    def tarball(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


WLLAMA = NpmPackage(
    name="@wllama/wllama",
    version="2.3.7",
    integrity="sha512-T273gBEqEZCHAoyNZDg+X6boQWktaq+efNF6bJo5aHToJr7jS1kCYImKXDdBi2/"
    "CccRuBUcMBHHLHiQN4+OfKQ==",
    licence="MIT",
    members={
        "index.min.js": "package/esm/index.min.js",
        "wllama.wasm": "package/esm/single-thread/wllama.wasm",
        "LICENCE": "package/LICENCE",
    },
)

Fetch = Callable[[str], bytes]


def fetch_url(url: str) -> bytes:
    """The body behind a URL; the system's proxies are honoured.

    Raises:
        OSError: no answer, or one that is not 200.
    """
    if not url.startswith(("https://", "http://")):
        raise OSError(f"not a web address: {url}")
    with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:
        body: bytes = answer.read(LARGEST_BYTES + 1)
    return body


def package_files(
    progress: Progress,
    package: NpmPackage = WLLAMA,
    *,
    cache: Path | None = None,
    fetch: Fetch = fetch_url,
) -> dict[str, bytes]:
    """The package's files by our names for them: from the cache, else from the npm registry
    ($npm_config_registry, or npm's own).

    Raises:
        MissingTool: it cannot be fetched, or its bytes are not the pinned ones.
        StorageError: the cache folder cannot be written.
    """
    kept = package_file(package, cache)
    try:
        body = kept.read_bytes()
    except OSError:
        body = b""
    if not is_pinned(body, package):
        with progress.task(f"fetching {package.name} {package.version}", None):
            body = _fetched(package, kept, fetch)
        with storing(kept.parent):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, body)
    with tarfile.open(fileobj=io.BytesIO(body), mode="r:gz") as archive:
        return {name: _member(archive, path) for name, path in package.members.items()}


def package_file(package: NpmPackage = WLLAMA, cache: Path | None = None) -> Path:
    """Where the tarball is kept."""
    return (cache or cache_folder().parent) / "npm" / package.tarball


def is_pinned(body: bytes, package: NpmPackage) -> bool:
    """Whether these bytes have the pinned hash."""
    return _integrity(body) == package.integrity


def _integrity(body: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(body).digest()).decode()


def _fetched(package: NpmPackage, kept: Path, fetch: Fetch) -> bytes:
    registry = os.environ.get(REGISTRY_VARIABLE) or os.environ.get(REGISTRY_VARIABLE.upper())
    url = f"{(registry or REGISTRY).rstrip('/')}/{package.name}/-/{package.tarball}"
    another = (
        f"or put {package.tarball} ({package.integrity[:19]}...) into {kept.parent}; "
        f"{REGISTRY_VARIABLE} names another registry, {CACHE_VARIABLE} another cache folder"
    )
    what = f"{package.name} {package.version}, which runs the model in a browser,"
    try:
        body = fetch(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MissingTool(
            f"{what} is not kept here and cannot be fetched: {reason}",
            where=url,
            hint=f"it is fetched once: connect this machine to a network, {another}",
        ) from error
    if not is_pinned(body, package):
        raise MissingTool(
            f"{what} must have {package.integrity}; this registry gives {_integrity(body)}",
            where=url,
            hint=f"nothing of it is used or kept; try another registry, {another}",
        )
    return body


def _member(archive: tarfile.TarFile, path: str) -> bytes:
    stream = archive.extractfile(path)
    assert stream is not None, f"{path} is in the pinned package"
    return stream.read()
