"""Turn a bundle into the new one that an update file describes, or leave it as it is."""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from pydantic import ValidationError

from edgedistill.artifacts import (
    MANIFEST,
    Finished,
    digest_of_file,
    link_or_copy,
    load_finished,
    storing,
    swap_folders,
    sync_files,
)
from edgedistill.errors import ArtifactError, GateFailed, UsageError
from edgedistill.patch import apply_patch
from edgedistill.update.contents import CONTENTS, Contents, Entry, read_bundle

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Applied:
    """A bundle after an update; `changed` is False when it was the new one already. `same` of
    `samples` answers were the new bundle's, None when they were not asked."""

    folder: Path
    old: str
    new: str
    changed: bool
    samples: int
    same: int | None


def apply(
    bundle: Path,
    file: Path,
    sha256: str | None = None,
    compare: Callable[[Path, Contents], int] | None = None,
) -> Applied:
    """Turn the bundle into the update's new one. The old one stays until the new one is complete,
    byte for byte what was made; applying the same update again changes nothing.

    `sha256` is what the update file's must be, told by whoever is trusted. `compare(folder,
    contents)` counts the samples that the new bundle answers as it should, before the old one goes.

    Raises:
        UsageError: a path is not there, or the process works inside the bundle.
        ArtifactError: the update is torn, altered or for another bundle, or this is no bundle.
        GateFailed: step "update": a sample is answered differently; the old bundle stays.
        StorageError: no space or no permission; the old bundle stays.
    """
    bundle = bundle.resolve()
    _recover(bundle)
    held = read_bundle(bundle)
    _require_outside(bundle)
    with _opened(file, sha256) as archive:
        contents = _contents(archive, file)
        made = Applied(bundle, held.digest, contents.new, True, len(contents.samples), None)
        if held.digest == contents.new:
            return Applied(bundle, held.digest, contents.new, False, made.samples, None)
        _require_parts(held, contents)
        making = bundle.with_name(f".{bundle.name}.updating")
        with storing(bundle):
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            try:
                _fill(making, held, contents, archive, file)
                same = None if compare is None else compare(making, contents)
                if same is not None and same < len(contents.samples):
                    raise _differs(same, len(contents.samples), file)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
            _swap(making, bundle)
    return Applied(bundle, held.digest, contents.new, True, len(contents.samples), same)


def _require_outside(bundle: Path) -> None:
    """The folder is replaced: who works in it would be left in one that is gone, and on Windows a
    folder that someone works in cannot be replaced."""
    here = Path.cwd()
    if here.is_relative_to(bundle):
        raise UsageError(
            "the bundle's folder is replaced by an update, and you are inside it",
            where=str(bundle),
            hint=f"go to the folder above, and give it as {bundle.name}",
        )


@contextlib.contextmanager
def _opened(file: Path, sha256: str | None) -> Iterator[zipfile.ZipFile]:
    if not file.is_file():
        raise UsageError("there is no such update file", where=str(file))
    if sha256 is not None and digest_of_file(file) != sha256.lower():
        _refuse(file, "its sha256 is not the one that was asked for")
    with contextlib.ExitStack() as stack:
        with _reading(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
        yield archive


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What `zipfile` and the decompressors raise where a byte is not as it was written."""
    try:
        yield
    except UNREADABLE as error:
        # An offset before the file's beginning is EINVAL; any other number is of the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        _refuse(file, f"it is torn or altered ({error})", error)


def _contents(archive: zipfile.ZipFile, file: Path) -> Contents:
    try:
        with _reading(file):
            written = archive.read(CONTENTS)
        contents = Contents.model_validate_json(written)
    except KeyError as error:
        _refuse(file, f"it holds no {CONTENTS}", error)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        _refuse(file, f"{CONTENTS}: {place}: {first['msg']}", error)
    if MANIFEST not in contents.files or contents.model not in contents.files:
        _refuse(file, f"{CONTENTS} does not list the bundle's {MANIFEST} and model")
    return contents


def _require_parts(held: Finished, contents: Contents) -> None:
    """Every file that the update builds on is here, unchanged."""
    for entry in contents.files.values():
        if entry.old is None:
            continue
        file = held.folder / entry.old
        if not file.is_file() or digest_of_file(file) != entry.old_sha256:
            raise ArtifactError(
                f"this update is for another bundle: {entry.old} is not the file it was made for",
                where=str(held.folder),
                hint=f"it is for the bundle with the digest {contents.old}; this one's is "
                f"{held.digest}",
            )


def _fill(
    making: Path, held: Finished, contents: Contents, archive: zipfile.ZipFile, file: Path
) -> None:
    for name, entry in contents.files.items():
        into = making / name
        into.parent.mkdir(parents=True, exist_ok=True)
        if entry.how == "kept":
            link_or_copy(held.folder / (entry.old or name), into)
            continue
        source = f"files/{name}" if entry.how == "added" else f"patches/{name}"
        try:
            with _reading(file), archive.open(source) as stream:
                found = _written(stream, held, entry, into)
        except KeyError as error:
            _refuse(file, f"it holds no {source}", error)
        if found != entry.sha256 or into.stat().st_size != entry.bytes:
            _refuse(file, f"{name} does not have the sha256 that {CONTENTS} says")
    sync_files(making)
    done = load_finished(making, reused=False)
    if done is None or done.digest != contents.new:
        _refuse(file, "the bundle that it makes is not the one it promises")
    _carry_over(making, held)


def _carry_over(making: Path, held: Finished) -> None:
    """What the user put into the old bundle or changed there goes along, beside the new files."""
    listed = held.manifest["outputs"]
    for file in held.folder.rglob("*"):
        name = file.relative_to(held.folder).as_posix()
        if not file.is_file() or name == MANIFEST:
            continue
        if name in listed and digest_of_file(file) == listed[name]["sha256"]:
            continue
        into = making / name
        into.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, into.with_name(f"{into.name}.yours") if into.exists() else into)


def _written(stream: IO[bytes], held: Finished, entry: Entry, into: Path) -> str:
    if entry.how == "patched" and entry.old is not None:
        return apply_patch(held.folder / entry.old, entry.parts, stream, into)
    with into.open("wb") as target:
        shutil.copyfileobj(stream, target)
    return digest_of_file(into)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap(making: Path, folder: Path) -> None:
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    swap_folders(making, folder, old)
    shutil.rmtree(old, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Cut off between the two renames of `_swap`: the old bundle comes back."""
    if not folder.exists() and _old(folder).is_dir():
        os.replace(_old(folder), folder)


def _differs(same: int, samples: int, file: Path) -> GateFailed:
    return GateFailed(
        "update",
        f"{samples - same} of {samples} sample prompts are answered otherwise than on the machine "
        "that made the update",
        where=str(file),
        hint="the new files are right byte by byte, so this device's kernels differ; the old "
        "bundle stays: apply without --check to take the new one",
    )


def _refuse(where: Path, why: str, cause: Exception | None = None) -> NoReturn:
    raise ArtifactError(
        f"the update cannot be used: {why}",
        where=where.name,
        hint="get the update file again; the bundle stays as it was",
    ) from cause
