"""How a GGUF file wants to be asked: by its own chat template and tokens, or as its bundle says."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import read_tokenizer_keys, write_tokenizer

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Asked:
    """A model file, how it is asked, and the manifest of its bundle where it lies in one."""

    file: Path
    spec: StudentSpec
    manifest: dict[str, Any] | None = None

    def prompt(self) -> StudentPrompt:
        """By the file's own tokenizer and chat template.

        Raises:
            WeightsError: it has none that can be used.
        """
        with tempfile.TemporaryDirectory(prefix="edgedistill-") as folder:
            write_tokenizer(Path(folder), read_tokenizer_keys(self.file))
            return StudentPrompt(Path(folder), self.spec)  # it has read all it needs


def asked_model(
    path: Path, student: StudentSpec | None, system: str | None, max_tokens: int | None
) -> Asked:
    """The model that `path` names: a GGUF file, or a bundle with one. What `system` and
    `max_tokens` leave open is as `student` says, else the bundle, else nothing and 128 tokens.

    Raises:
        ArtifactError: there is no such file, or the folder holds no bundle of a GGUF file.
    """
    told: dict[str, Any] = {} if student is None else student.model_dump()
    if path.is_file():
        return Asked(path, _spec(path, told, system, max_tokens))
    manifest = path / MANIFEST
    if not manifest.is_file():
        what = "this folder is no bundle" if path.is_dir() else "there is no such file"
        hint = "give a GGUF file, a folder of dist/, or a URL with http:// or https:// before it"
        raise ArtifactError(what, where=str(path), hint=hint)
    try:
        value = json.loads(manifest.read_text("utf-8"))
        file, own = path / value["facts"]["model"], value["spec"]["recipe"]["student"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the bundle's manifest cannot be read: {error!r}", where=str(manifest)
        ) from error
    if file.suffix != ".gguf":
        raise ArtifactError(f"its model is no GGUF file: {file.name}", where=str(path))
    return Asked(file, _spec(file, told or own, system, max_tokens), value)


def _spec(
    file: Path, own: dict[str, Any], system: str | None, max_tokens: int | None
) -> StudentSpec:
    given = {"system": own.get("system") if system is None else system}
    given |= {name: own[name] for name in ("prompt", "max_tokens") if name in own}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    return StudentSpec.model_validate({"weights": str(file), **given})
