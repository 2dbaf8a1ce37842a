"""A model (GGUF file or ONNX folder): how it wants to be asked, by its own chat template and tokens
or as its bundle says, and what a result says of it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import digest_of, digest_of_file
from edgedistill.bundle_result import bundle_facts
from edgedistill.errors import ArtifactError
from edgedistill.gguf_header import read_header
from edgedistill.onnx_tokenizer import write_prompt_files
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtimes import size_of
from edgedistill.student import read_tokenizer_keys, write_tokenizer

MANIFEST, GENAI_CONFIG = "manifest.json", "genai_config.json"
GIVE = "give a GGUF file, an ONNX model folder, a folder of dist/, or a URL with http:// before it"


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
            if self.file.is_dir():
                write_prompt_files(self.file, Path(folder))
            else:
                write_tokenizer(Path(folder), read_tokenizer_keys(self.file))
            return StudentPrompt(Path(folder), self.spec)  # it has read all it needs


def asked_model(
    path: Path, student: StudentSpec | None, system: str | None, max_tokens: int | None
) -> Asked:
    """The model that `path` names: a GGUF file, an ONNX model folder, or a bundle with one of them.
    What `system` and `max_tokens` leave open is as `student` says, else the bundle, else nothing
    and 128 tokens.

    Raises:
        ArtifactError: there is no such file, or the folder holds neither.
    """
    told: dict[str, Any] = {} if student is None else student.model_dump()
    if path.is_file() or (path / GENAI_CONFIG).is_file():
        return Asked(path, _spec(path, told, system, max_tokens))
    manifest = path / MANIFEST
    if not manifest.is_file():
        folder = "this folder is no bundle and no ONNX model (it has no genai_config.json)"
        raise ArtifactError(
            folder if path.is_dir() else "there is no such file", where=str(path), hint=GIVE
        )
    try:
        value = json.loads(manifest.read_text("utf-8"))
        file, own = path / value["facts"]["model"], value["spec"]["recipe"]["student"]
        _ = value["spec"]["recipe"]["name"], value["spec"]["target"]["name"], value["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the bundle's manifest cannot be read: {error!r}", where=str(manifest)
        ) from error
    if file.suffix != ".gguf" and not (file / GENAI_CONFIG).is_file():
        what = f"its model is neither a GGUF file nor a model of onnxruntime-genai: {file.name}"
        raise ArtifactError(what, where=str(path))
    return Asked(file, _spec(file, told or own, system, max_tokens), value)


def model_facts(asked: Asked) -> dict[str, Any]:
    """What a result says of a model: name, file, sha256, bytes, types (how many matrices have each,
    of a GGUF file), and the bundle it is of. A folder's sha256 is over those of its files."""
    file = asked.file
    bundle = asked.manifest and bundle_facts(file.parent, asked.manifest)
    return {
        "name": file.name if file.is_dir() else file.stem,
        "file": file.name,
        "sha256": _digest(file),
        "bytes": size_of(file),
        "types": {} if file.is_dir() else _types(file),
        "bundle": bundle,
    }


def _digest(model: Path) -> str:
    if model.is_file():
        return digest_of_file(model)
    files = sorted(file for file in model.rglob("*") if file.is_file())
    return digest_of({file.relative_to(model).as_posix(): digest_of_file(file) for file in files})


def _types(file: Path) -> dict[str, int]:
    matrices = (tensor for tensor in read_header(file).tensors if len(tensor.shape) > 1)
    return dict(Counter(tensor.type for tensor in matrices).most_common())


def context_limit(model: Path) -> int | None:
    """The longest context in tokens that the model was made for, where it tells.

    Raises:
        ArtifactError: this is no sound model.
    """
    if model.is_dir():
        try:
            value = json.loads((model / GENAI_CONFIG).read_text("utf-8"))
            found = value["model"]["context_length"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{GENAI_CONFIG} cannot be read: {error!r}", where=str(model)
            ) from error
    else:
        header = read_header(model)
        found = header.keys.get(f"{header.architecture}.context_length")
    return found if isinstance(found, int) else None


def _spec(
    file: Path, own: dict[str, Any], system: str | None, max_tokens: int | None
) -> StudentSpec:
    given = {"system": own.get("system") if system is None else system}
    given |= {name: own[name] for name in ("prompt", "max_tokens") if name in own}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    return StudentSpec.model_validate({"weights": str(file), **given})
