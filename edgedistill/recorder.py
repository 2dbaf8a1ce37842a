"""What a build made so far: each stage's folder by its name, for the manifests a bundle carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import load_finished
from edgedistill.progress import Passing


@dataclass
class Recorder(Passing):
    """Remembers each stage's folder, by the stage's name and `of`. Candidates are many; the
    manifest of quantize names them."""

    folders: dict[str, Path] = field(default_factory=dict)
    of: str = ""

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        # Several allocations may have one made: a precision measured, a student prepared.
        if name != "candidate" and self.folders.get(name) != folder:
            key, twice = name + self.of, 2
            while self.folders.get(key, folder) != folder:  # one allocation may be trimmed twice
                key, twice = f"{name} {twice}{self.of}", twice + 1
            self.folders[key] = folder
        super().stage(name, folder, reused=reused)

    def branch(self, of: str = "") -> Recorder:
        """The same listener with its own list: what one target adds is not the next one's."""
        return Recorder(self.listener, dict(self.folders), of)

    def manifests(self) -> dict[str, Mapping[str, Any]]:
        """Manifest of every complete stage so far, in order."""
        found = {name: load_finished(at, reused=True) for name, at in self.folders.items()}
        return {name: done.manifest for name, done in found.items() if done is not None}
