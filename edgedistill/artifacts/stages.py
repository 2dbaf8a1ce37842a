"""Stage folders: what identifies one, and how it becomes complete.

A stage's folder is `<root>/<stage>-<key>`, where the key is the short sha256 of the canonical JSON
of stage, stage version, resolved spec, input digests and the tools that shape the result.
`manifest.json` is written last, so its presence means complete; a folder without one is torn and
is never read, except for the `resume` subfolder that a stage keeps on purpose.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts.contracts import Dataset
from edgedistill.errors import ArtifactError, EdgedistillError, StorageError
from edgedistill.memory import PeakMemory
from edgedistill.progress import Progress

MANIFEST = "manifest.json"
RESUME = "resume"
PARTS = ("train", "validation", "held_out")  # of a dataset
CHUNK = 1 << 20
Json = Any


def canonical(value: Json) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Json) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 (hex) of a file, read in chunks of 1 MiB."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that shape a stage's result."""
    found = {}
    for name in packages:
        try:
            # "+cpu" and the like name a build of the same code, not other code.
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


STORAGE_HINTS = {
    errno.ENOSPC: "free some space (edgedistill gc removes what no build uses)",
    errno.EDQUOT: "your quota on this disk is used up",
    errno.EACCES: "make the folder writable, or choose another with --workspace",
    errno.ENOTDIR: "a file is where a folder should be; choose another with --workspace",
    errno.EEXIST: "a file is where a folder should be; choose another with --workspace",
    errno.EROFS: "this disk is read-only; choose another folder with --workspace",
}
WINDOWS_ERRORS = {5: errno.EACCES, 112: errno.ENOSPC}
FULL_DISK_BYTES = 4 << 20
# Libraries written in Rust (safetensors, tokenizers) raise errors of their own with this text.
OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Translate 'no space' and 'no permission' while writing below `path` into a StorageError."""
    try:
        yield
    except EdgedistillError:
        raise
    except Exception as error:
        number = _storage_error(error, path)
        if number is None:
            raise
        raise StorageError(
            f"cannot write: {os.strerror(number)}",
            where=str(getattr(error, "filename", None) or path),
            hint=f"{STORAGE_HINTS[number]}; what was finished is kept and reused",
        ) from error


def require_writable(folder: Path) -> None:
    """Make the folder and try it, before the work whose result it is to hold.

    Raises:
        StorageError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"nothing can be written there: {error.strerror}",
            where=str(folder),
            hint="make the folder writable, or choose another (--dist, or -o)",
        ) from error


def _storage_error(error: Exception, path: Path) -> int | None:
    """The errno of what the disk refused, or None when the error is about something else."""
    told = OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if told and os.name == "nt":
        number = WINDOWS_ERRORS.get(int(told[1]))
    if number is None and isinstance(error, RuntimeError) and is_full(path):
        number = errno.ENOSPC  # torch's writer says that it failed, not why
    return number if number in STORAGE_HINTS else None


def is_full(path: Path) -> bool:
    """Whether the disk of `path`, which need not be there yet, has no room left to speak of."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free < FULL_DISK_BYTES


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that `path` holds either its old content or all of `data`, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Readable JSON, written atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def link_or_copy(source: Path, destination: Path) -> None:
    """The same file (or each of a folder) under another name; a copy where the disk has no links.
    What was there under that name goes."""
    if source.is_dir():
        destination.mkdir()
        for each in source.iterdir():
            link_or_copy(each, destination / each.name)
        return
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        part = destination.with_name(f"{destination.name}.part")  # a kill leaves no torn file
        shutil.copyfile(source, part)
        os.replace(part, destination)


def swap_folders(new: Path, folder: Path, old: Path) -> None:
    """`new` takes the place of `folder`, which becomes `old`; where the system refuses the second
    rename (on Windows, while another program reads a file in `new`), `folder` stays what it was.

    Raises:
        OSError: it refused one of them.
    """
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """fsync every file below `folder`, so that a manifest never outlives what it lists."""
    for path in _files(folder):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def _files(folder: Path) -> list[Path]:
    skipped = folder / RESUME
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST and skipped not in p.parents
    )


@dataclass(frozen=True)
class Identity:
    """What makes one run of a stage the same as another."""

    stage: str
    version: int
    spec: Mapping[str, Json]
    inputs: Mapping[str, str]
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return digest_of(asdict(self))[:16]

    def folder(self, root: Path) -> Path:
        return root / f"{self.stage}-{self.key}"


@dataclass(frozen=True)
class Finished:
    """A complete stage folder. `digest` is over its files, so equal content gives equal digests."""

    folder: Path
    digest: str
    facts: Mapping[str, Json]
    manifest: Mapping[str, Json]
    reused: bool

    @property
    def name(self) -> str:
        return self.folder.name


def run_stage(
    identity: Identity,
    root: Path,
    progress: Progress,
    work: Callable[[Path], Mapping[str, Json]],
) -> Finished:
    """Reuse the complete folder of `identity` below `root`, or make it by calling `work(folder)`.

    `work` writes files only inside the folder and returns the facts that the manifest keeps. What
    it writes below `folder/resume` survives a crash and is removed once the stage is complete.

    Raises:
        StorageError: no space or no permission. Whatever `work` raises passes through.
    """
    folder = identity.folder(root)
    found = load_finished(folder, reused=True)
    progress.stage(identity.stage, folder, reused=found is not None)
    if found is not None:
        shutil.rmtree(folder / RESUME, ignore_errors=True)  # killed before it could be removed
        return found
    started = time.time()
    with storing(folder), PeakMemory() as memory:
        _clear_torn(folder)
        facts = dict(work(folder))
        # Flushing waits for the disk, hashing for the processor: at once, only for the slower.
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(sync_files, folder)
            outputs = outputs_of(folder)
            flushed.result()
    manifest = manifest_of(identity, folder, facts, started, memory, outputs)
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / RESUME, ignore_errors=True)
    progress.finished(identity.stage, manifest["wall_seconds"], memory.own_bytes)
    done = load_finished(folder, reused=False)
    assert done is not None
    return done


def _clear_torn(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name == RESUME:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def outputs_of(folder: Path) -> dict[str, Any]:
    """Digest and size of every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": digest_of_file(path),
            "bytes": path.stat().st_size,
        }
        for path in _files(folder)
    }


def manifest_of(
    identity: Identity,
    folder: Path,
    facts: Json,
    started: float,
    memory: PeakMemory,
    outputs: Mapping[str, Any] | None = None,
) -> dict[str, Json]:
    """The manifest of a folder that is complete; `outputs` where they are known already."""
    outputs = outputs_of(folder) if outputs is None else outputs
    return {
        **asdict(identity),
        "key": identity.key,
        "outputs": outputs,
        "digest": digest_of({name: entry["sha256"] for name, entry in outputs.items()}),
        "facts": facts,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "wall_seconds": round(time.time() - started, 3),
        "peak_memory_bytes": memory.own_bytes,
        "teacher_server_peak_memory_bytes": memory.server_bytes,
    }


def load_finished(folder: Path, *, reused: bool) -> Finished | None:
    """The complete stage in `folder`, or None when it is absent or torn.

    Raises:
        ArtifactError: the manifest is there but a file it lists is gone or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        outputs, facts, digest = manifest["outputs"], manifest["facts"], manifest["digest"]
    except (ValueError, KeyError) as error:
        raise _damaged(folder, f"its {MANIFEST} cannot be read ({error})") from error
    for name, entry in outputs.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise _damaged(folder, f"{name} is missing or has another size than when it was made")
    return Finished(folder, digest, facts, manifest, reused)


def dataset_of(done: Finished, train: int, like: Dataset) -> Dataset:
    """The dataset in a stage's folder, whose `train` training rows are other ones than `like`'s."""
    return replace(like, folder=done.folder, train=train, digest=dataset_digest(done))


def dataset_digest(done: Finished) -> str:
    """Without the rejected ones: how a call failed changes nothing that is learnt or measured."""
    outputs = done.manifest["outputs"]
    return digest_of({name: outputs[f"{name}.jsonl"]["sha256"] for name in PARTS})


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"this finished stage was changed from outside: {why}",
        where=str(folder),
        hint="delete this folder; the next build makes it again",
    )
