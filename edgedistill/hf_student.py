"""A Hugging Face model folder turned into the checkpoint of a student: fp32, and nothing guessed.

transformers fills what a file lacks with random numbers and passes over what it does not know; both
are refused here, as is whatever the export could not say.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.errors import ArtifactError, WeightsError
from edgedistill.families import is_own
from edgedistill.tensors import read_layout
from edgedistill.weights.folder import WEIGHTS, weight_files

FLOATS = ("F32", "F16", "BF16")  # safetensors' names; fp32 holds all their values
EMBEDDING = "model.embed_tokens.weight"


def embedding_rows(source: Path) -> int:
    """How many tokens a model folder has weights for.

    Raises:
        WeightsError: it has no such matrix, or numbers of another type than FLOATS.
    """
    from safetensors import SafetensorError, safe_open

    rows = None
    for name in weight_files(source):
        try:
            with safe_open(str(source / name), "np") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dict
                    found = opened.get_slice(tensor)
                    if found.get_dtype() not in FLOATS:
                        _refuse(source / name, f"{tensor} is {found.get_dtype()}, no fp32 or half")
                    if tensor == EMBEDDING:
                        rows = int(found.get_shape()[0])
        except (SafetensorError, OSError) as error:
            _refuse(source / name, f"it cannot be read: {error}", error)
    if rows is None:
        _refuse(source, f"it has no {EMBEDDING}")
    return rows


def convert_folder(source: Path, folder: Path, ids: dict[str, Any]) -> int:
    """Write `source` as an fp32 checkpoint into `folder`, of the token IDs `ids` (bos, eos, pad);
    returns the number of parameters.

    Raises:
        WeightsError: transformers reads something else than what is in it, or the export could not
            say what it needs.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # saving draws a bar; tqdm reads this when imported
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # its configs raise errors of their own
        _refuse(source, f"transformers cannot read it: {error}", error)
    _require_whole(source, told)
    for name, value in ids.items():
        setattr(model.config, f"{name}_token_id", value)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    model.generation_config = GenerationConfig(
        **{f"{name}_token_id": value for name, value in ids.items()}
    )
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    if not (folder / WEIGHTS).is_file():
        _refuse(source, f"transformers did not write it as one {WEIGHTS}")
    if is_own(folder):
        try:
            read_layout(folder, "F32")
        except ArtifactError as error:
            _refuse(source, error.what, error)
    return sum(parameter.numel() for parameter in model.parameters())


def _require_whole(source: Path, told: Any) -> None:
    for kind, what in (
        ("missing_keys", "the files lack {}, which the model needs"),
        ("unexpected_keys", "the files hold {}, which the model has no use for"),
        ("mismatched_keys", "{} has another shape than config.json says"),
    ):
        names = sorted(str(each[0] if isinstance(each, tuple) else each) for each in told[kind])
        if names:
            count = f" (one of {len(names)})" if len(names) > 1 else ""
            _refuse(source, what.format(names[0] + count))


def _refuse(where: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(what, where=str(where), hint="choose another student.weights") from cause
