"""Hugging Face models by name: a folder on this machine, or a model of the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import WeightsError
from edgedistill.progress import Progress
from edgedistill.weights.folder import digest_of_folder
from edgedistill.weights.hub import HubModel, fetch_model, hub_model
from edgedistill.weights.pins import KNOWN


@dataclass(frozen=True)
class ModelFolder:
    """`identity` tells its content: a sha256 over its files, or repository and commit hash."""

    name: str
    identity: str
    source: str
    place: Path | HubModel

    def obtain(self, progress: Progress, accept: Callable[[Path], object]) -> Path:
        """The folder; of a hub model `accept` gets config.json before its weights are fetched.

        Raises:
            WeightsError, StorageError: see `hub.fetch_model`.
        """
        if isinstance(self.place, Path):
            return self.place
        return fetch_model(self.place, progress, accept)


def folder_or_hub(weights: str) -> Path | HubModel | None:
    """Which of the two weights names, if any; the folder need not be there.

    Raises:
        WeightsError: a hub model without its full revision.
    """
    if weights.lower().endswith(".gguf") or weights in KNOWN:
        return None
    return Path(weights) if Path(weights).is_absolute() else hub_model(weights)


def model_folder(weights: str) -> ModelFolder | None:
    """The Hugging Face model that weights names; None: it is a GGUF file or a pinned name.

    Raises:
        WeightsError: a folder without weights, or a hub model without its full revision.
    """
    place = folder_or_hub(weights)
    if isinstance(place, Path):
        if not place.is_dir():
            raise WeightsError("there is no such folder", where=str(place))
        digest = digest_of_folder(place)
        return ModelFolder(place.name, digest, f"{place.name} sha256:{digest}", place)
    if place is not None:
        return ModelFolder(place.repo, str(place), f"hub {place}", place)
    return None
