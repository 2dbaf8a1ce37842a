"""Put a bundle in its place, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.artifacts import (
    MANIFEST,
    Bundle,
    Finished,
    Identity,
    digest_of_file,
    load_finished,
    manifest_of,
    storing,
    swap_folders,
    sync_files,
    write_json,
)
from edgedistill.errors import ArtifactError
from edgedistill.memory import PeakMemory
from edgedistill.progress import Progress

Json = Mapping[str, Any]
STAGE = "pack"
KEPT = ("stage", "key", "digest", "spec", "inputs", "tools", "started", "wall_seconds",
        "peak_memory_bytes", "teacher_server_peak_memory_bytes")  # fmt: skip


def publish(
    folder: Path,
    identity: Identity,
    facts: Json,
    chain: Mapping[str, Json],
    fill: Callable[[Path], None],
    progress: Progress,
) -> Bundle:
    """Reuse the bundle in `folder` when it is the same and whole, else make it by `fill`."""
    found = _whole(folder)
    reused = found is not None and found.manifest.get("key") == identity.key
    progress.stage(STAGE, folder, reused=reused)
    if found is not None and reused:
        return Bundle(folder, found.digest, folder / found.facts["model"])
    _refuse_foreign(folder)
    started = time.time()
    making = folder.with_name(f".{folder.name}.making")
    with storing(folder):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        with PeakMemory() as memory:
            fill(making)
            sync_files(making)
        manifest = manifest_of(identity, making, facts, started, memory) | {
            "made_by": f"edgedistill {__version__}",
            "provenance": {name: reduced(manifest) for name, manifest in chain.items()},
        }
        write_json(making / MANIFEST, manifest)
        _swap(making, folder, progress)
    progress.finished(STAGE, manifest["wall_seconds"], memory.own_bytes)
    return Bundle(folder, manifest["digest"], folder / facts["model"])


def reduced(manifest: Json) -> dict[str, Any]:
    """A stage's manifest without its files and facts, and with the seed its spec holds."""
    kept = {name: manifest[name] for name in KEPT if name in manifest}
    return kept | {"seed": _seed(manifest["spec"])}


def _seed(spec: Any) -> int | None:
    if not isinstance(spec, Mapping):
        return None
    if isinstance(spec.get("seed"), int):
        return int(spec["seed"])
    return next((seed for inner in spec.values() if (seed := _seed(inner)) is not None), None)


def _whole(folder: Path) -> Finished | None:
    """The bundle in `folder` when every file has its size, else None: it is made again."""
    try:
        return load_finished(folder, reused=True)
    except ArtifactError:
        return None


def _listed(folder: Path) -> dict[str, Any] | None:
    """Files of the bundle in `folder` by its manifest; None when there is no bundle."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return dict(manifest["outputs"]) if manifest["stage"] == STAGE else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or _listed(folder) is not None:
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ArtifactError(
            "the bundle belongs here, but something else is here already",
            where=str(folder),
            hint="move it away, or choose another place for bundles",
        )


def _swap(making: Path, folder: Path, progress: Progress) -> None:
    """Put the new bundle in place; an old one that its user changed is kept beside it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        changed = _changed(folder)
        if changed:
            old = _free_name(folder)
            progress.note(f"{folder.name} had been changed ({changed[0]}); kept as {old.name}")
        swap_folders(making, folder, old)
        if not changed:
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(making, folder)


def _changed(folder: Path) -> list[str]:
    """Files below `folder` that are not as the manifest lists them, or not in it."""
    listed = _listed(folder) or {}
    present = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    present.pop(MANIFEST, None)
    return [
        name
        for name, path in sorted(present.items())
        if name not in listed or digest_of_file(path) != listed[name]["sha256"]
    ]


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.changed-{i}") for i in range(1, 10_000))
    return next(name for name in names if not name.exists())
