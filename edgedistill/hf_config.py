"""What the JSON files of a Hugging Face model folder say, and why a folder can be no student.

Nothing here reads weights or needs torch, so `validate` can ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.converter import HINT, checkout
from edgedistill.errors import WeightsError
from edgedistill.families import BY_SOURCE, known_names
from edgedistill.weights.folder import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER_CONFIG,
    weight_files,
)

OTHER = "choose another student.weights"


@dataclass(frozen=True)
class FolderConfig:
    """`model`, `generation` and `tokenizer` are config.json, generation_config.json and
    tokenizer_config.json; the last two may be empty."""

    model: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    template: str | None

    @property
    def adds_bos(self) -> bool | None:
        """Whether texts begin with a BOS; None: tokenizer_config.json does not say."""
        said = self.tokenizer.get("add_bos_token")
        return said if isinstance(said, bool) else None

    def token_id(self, name: str, known: Callable[[str | int], int]) -> int | None:
        """ID of the special token `name` ("eos"): the tokenizer's own, else the model's where it
        names one only. `known` turns a token or an ID into an ID of the vocabulary, or raises."""
        own = self.tokenizer.get(f"{name}_token")
        text = own.get("content") if isinstance(own, Mapping) else own
        if isinstance(text, str):
            return known(text)
        for config in (self.generation, self.model):
            index = config.get(f"{name}_token_id")
            if isinstance(index, list) and len(index) == 1:
                (index,) = index
            if isinstance(index, int):
                return known(index)
        return None


def of_folder(folder: Path) -> FolderConfig:
    """Read the JSON files of a model folder.

    Raises:
        WeightsError: config.json is missing, or one of them cannot be read.
    """
    tokenizer = _read(folder / TOKENIZER_CONFIG, {})
    template = _default_template(tokenizer.get("chat_template"))
    try:
        template = (folder / TEMPLATE).read_text("utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot be read: {error}", where=str(folder / TEMPLATE)) from error
    return FolderConfig(
        _read(folder / CONFIG), _read(folder / GENERATION, {}), tokenizer, template or None
    )


def _default_template(found: Any) -> str | None:
    """A tokenizer may have several templates by name."""
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def require_student(folder: Path) -> FolderConfig:
    """Refuse a folder that cannot become a student, without looking at weights or tokens.

    Raises:
        WeightsError: another family, quantized, pickled, or without a chat template.
    """
    config = of_folder(folder)
    require_family(config.model, folder / CONFIG)
    weight_files(folder)
    if config.template is None:
        _refuse(
            folder,
            f"it has no chat template, neither in {TEMPLATE} nor in {TOKENIZER_CONFIG}, so nobody "
            "knows how to prompt it",
            "use an instruction-tuned model",
        )
    return config


def require_family(config: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a config.json of another family than those of families.py, unless llama.cpp's
    converter is at hand; and weights that were quantized.

    Raises:
        WeightsError: names the list of families.
    """
    named = config.get("architectures")
    source = named[0] if isinstance(named, list) and named else None
    if config.get("quantization_config"):
        _refuse(where, "its weights are quantized; training needs fp32")
    if source in BY_SOURCE:
        return
    what = f"architecture {source!r} cannot be trained, only {known_names()}"
    if checkout() is None:
        _refuse(where, what, f"{OTHER}; or {HINT}")
    if config.get("auto_map"):
        _refuse(where, "it brings code of its own (auto_map), which is never run")


def _read(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        _refuse(file.parent, f"there is no {file.name}: this is no Hugging Face model folder")
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot be read: {error}", where=str(file)) from error
    if not isinstance(found, dict):
        _refuse(file, "it does not hold a JSON object")
    return found


def _refuse(where: Path | str, what: str, hint: str = OTHER) -> NoReturn:
    raise WeightsError(what, where=str(where), hint=hint)
