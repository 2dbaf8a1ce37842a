"""What an update file says (`update.json`), and the bundle it is for."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from edgedistill.artifacts import MANIFEST, Finished
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.strict import Strict

CONTENTS = "update.json"
STAGE = "pack"
SHA256 = r"^[0-9a-f]{64}$"


class Entry(Strict):
    """One file of the new bundle. `old`: the file it is kept or made from; `parts`: see patch.py,
    (bytes, place in the old file or null), from the beginning of the new file to its end."""

    sha256: str = Field(pattern=SHA256)
    bytes: int = Field(ge=0)
    how: Literal["kept", "added", "patched"]
    old: str | None = None
    old_sha256: str | None = Field(None, pattern=SHA256)
    parts: tuple[tuple[int, int | None], ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Entry:
        if (self.how == "added") != (self.old is None) or (self.old is None) != (
            self.old_sha256 is None
        ):
            raise ValueError("old and old_sha256 belong to kept and patched files, and to no other")
        if any(length <= 0 or (place or 0) < 0 for length, place in self.parts):
            raise ValueError("a part has a negative length or place")
        if self.how == "patched" and sum(length for length, _ in self.parts) != self.bytes:
            raise ValueError("the parts are not as long as the file")
        return self


class Sample(Strict):
    """A prompt as the runtime is given it, special tokens included, and the new bundle's answer."""

    prompt: str
    max_tokens: int
    answer: str


class Contents(Strict):
    """`update.json`. `old` and `new` are the digests of the two bundles (their manifests' own)."""

    format: Literal[1]
    made_by: str
    old: str
    new: str
    model: str
    adapter: str | None
    files: dict[str, Entry]
    samples: tuple[Sample, ...]

    @model_validator(mode="after")
    def _names_are_plain(self) -> Contents:
        named = [self.model, *self.files, *(entry.old or "x" for entry in self.files.values())]
        for name in named:
            path = PurePosixPath(name)
            if path.is_absolute() or {"..", "."} & set(name.split("/")) or set(name) & set("\\:"):
                raise ValueError(f"the file name {name!r} leads out of the bundle")
        return self


def read_bundle(folder: Path) -> Finished:
    """The bundle in `folder` as its manifest describes it; whether its files are still those is
    for the caller to ask.

    Raises:
        UsageError: there is no such folder. ArtifactError: it is no bundle.
    """
    if not folder.is_dir():
        raise UsageError(
            "there is no such folder",
            where=str(folder),
            hint="give a bundle's folder, such as dist/<recipe>-<target>",
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["stage"] != STAGE or not manifest["outputs"]:
            raise ValueError("it is of another stage")
        facts = {**manifest["facts"], "model": str(manifest["facts"]["model"])}
        return Finished(folder, str(manifest["digest"]), facts, manifest, reused=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "this is not a bundle", where=str(folder), hint="a bundle is what build writes in dist/"
        ) from error


def require_gguf(bundle: Finished) -> None:
    """Refuse a bundle of an ONNX model: a folder, of which no small difference can be made yet.

    Raises:
        UsageError: it is one.
    """
    model = bundle.facts["model"]
    if not model.endswith(".gguf"):
        raise UsageError(
            f"updates and adapters are for bundles of a GGUF file, and {model} is an ONNX model",
            where=str(bundle.folder),
            hint="send the new bundle whole",
        )
