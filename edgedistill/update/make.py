"""Write the update file that turns one bundle into another."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgedistill import __version__
from edgedistill.artifacts import MANIFEST, Finished, digest_of_file, storing
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.patch import segments, write_patch
from edgedistill.update.contents import CONTENTS, Contents, Entry, Sample, read_bundle, require_gguf

STAMP = (1980, 1, 1, 0, 0, 0)  # the same update twice gives the same bytes


@dataclass(frozen=True)
class Made:
    """An update file. `kept`, `added` and `patched` count the new bundle's files."""

    file: Path
    sha256: str
    bytes: int
    kept: int
    added: int
    patched: int
    samples: int


def make(
    old: Path,
    new: Path,
    destination: Path,
    ask: Callable[[Finished, int], list[Sample]] | None = None,
    samples: int = 0,
) -> Made:
    """Write the update that turns the bundle `old` into the bundle `new`.

    `ask(bundle, count)` gives answers of the new bundle for `apply(check=True)` to compare.

    Raises:
        UsageError: a folder is not there, one holds an ONNX model, or the two are the same.
        ArtifactError: one is not a bundle, or was changed since it was made.
    """
    before, after = read_bundle(old), read_bundle(new)
    if before.digest == after.digest:
        raise UsageError("the two bundles are the same: there is nothing to update")
    for bundle in (before, after):
        require_gguf(bundle)
        _require_unchanged(bundle)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    with storing(destination), contextlib.ExitStack() as stack:
        destination.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            entries = {name: _pack(archive, name, before, after) for name in _names(after)}
            contents = Contents(
                format=1,
                made_by=f"edgedistill {__version__}",
                old=before.digest,
                new=after.digest,
                model=after.facts["model"],
                adapter=after.facts.get("adapter"),
                files=entries,
                samples=tuple(ask(after, samples) if ask and samples else ()),
            )
            archive.writestr(_member(CONTENTS), contents.model_dump_json(indent=1))
        os.replace(temporary, destination)
    how = [entry.how for entry in entries.values()]
    return Made(
        file=destination,
        sha256=digest_of_file(destination),
        bytes=destination.stat().st_size,
        kept=how.count("kept"),
        added=how.count("added"),
        patched=how.count("patched"),
        samples=len(contents.samples),
    )


def _names(bundle: Finished) -> list[str]:
    return [MANIFEST, *bundle.manifest["outputs"]]


def _require_unchanged(bundle: Finished) -> None:
    for name, entry in bundle.manifest["outputs"].items():
        file = bundle.folder / name
        if not file.is_file() or digest_of_file(file) != entry["sha256"]:
            raise ArtifactError(
                f"{name} was changed since the bundle was made",
                where=str(bundle.folder),
                hint="an update is made from bundles as they were shipped",
            )


def _pack(archive: zipfile.ZipFile, name: str, before: Finished, after: Finished) -> Entry:
    """Put what the device needs for one file into the archive."""
    file = after.folder / name
    sha256, size = digest_of_file(file), file.stat().st_size
    held = before.manifest["outputs"]
    same = next((n for n, entry in held.items() if entry["sha256"] == sha256), None)
    if same is not None:
        return Entry(sha256=sha256, bytes=size, how="kept", old=same, old_sha256=sha256)
    model = before.facts["model"]
    if name == after.facts["model"] and name.endswith(".gguf") and model.endswith(".gguf"):
        parts = segments(before.folder / model, file)
        with archive.open(_member(f"patches/{name}", zipfile.ZIP_STORED), "w") as stream:
            write_patch(before.folder / model, file, parts, stream)
        return Entry(
            sha256=sha256, bytes=size, how="patched", old=model,
            old_sha256=held[model]["sha256"], parts=tuple(parts),
        )  # fmt: skip
    with file.open("rb") as source, archive.open(_member(f"files/{name}"), "w") as stream:
        shutil.copyfileobj(source, stream)
    return Entry(sha256=sha256, bytes=size, how="added")


def _member(name: str, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, STAMP)
    info.compress_type = compression
    return info
