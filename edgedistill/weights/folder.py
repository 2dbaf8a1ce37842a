"""A Hugging Face model folder: which of its files matter, their digest, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.artifacts import digest_of
from edgedistill.errors import WeightsError
from edgedistill.weights.cache import cache_folder, digest
from edgedistill.yamlfile import front_matter

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, CARD = "chat_template.jinja", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
UNKNOWN = "unknown"


def weight_files(folder: Path) -> list[str]:
    """Names of the files with the weights: model.safetensors, or the shards of its index.

    Raises:
        WeightsError: there are none, or some of them are not there.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        _refuse(folder, no_safetensors(path.name for path in folder.iterdir()))
    names = shards(index.read_bytes(), index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        _refuse(folder, f"{INDEX} names {missing[0]}, which is not there")
    return names


def shards(index: bytes, where: Path | str) -> list[str]:
    """File names in an index of safetensors.

    Raises:
        WeightsError: it is none, or names something outside its folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"no index of safetensors: {error!r}", where=str(where)) from error
    odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if odd or not names:
        _refuse(where, f"it names {odd[0]!r}, no file beside it" if odd else "it names no file")
    return names


def no_safetensors(names: Any) -> str:
    """What to say of a folder without safetensors."""
    pickled = [name for name in sorted(names) if name.endswith((".bin", ".pt", ".pth"))]
    only = f", only {pickled[0]}, which could run code when it is read" if pickled else ""
    return f"it has no {WEIGHTS} (or {INDEX} with its shards){only}"


def digest_of_folder(folder: Path) -> str:
    """sha256 over the files that shape a student; each is hashed again only when its size or time
    changed.

    Raises:
        WeightsError: no weights in it, or a file cannot be read.
    """
    index = [INDEX] if not (folder / WEIGHTS).is_file() else []
    found: dict[str, str] = {}
    try:
        for name in (*weight_files(folder), *index, *JSON, TEMPLATE):
            if (folder / name).is_file():
                found[name] = digest(folder / name, cache_folder())
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    return digest_of(found)


def licence_of(folder: Path) -> str:
    """The licence that the model card's front matter names, or "unknown"."""
    try:
        card: Mapping[str, Any] = front_matter((folder / CARD).read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return UNKNOWN
    named = card.get("license")
    if named == "other":
        named = card.get("license_name") or UNKNOWN
    return named if isinstance(named, str) and named.strip() else UNKNOWN


def _refuse(where: Path | str, what: str) -> NoReturn:
    hint = "choose another student.weights; pickled weights must be saved as safetensors first"
    raise WeightsError(what, where=str(where), hint=hint)
