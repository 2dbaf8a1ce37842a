"""Is the checkpoint that transformers made of a GGUF file the same model?

Its reader leaves some keys and tensors out: RoPE scaling above all. What the GGUF says is completed
in config.json; whatever then differs from what an export of the checkpoint would say is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgedistill.artifacts import write_json
from edgedistill.errors import ArtifactError, WeightsError
from edgedistill.families import (
    GEMMA_27B_LAYERS,
    gemma_layer_types,
    head_size,
    rope,
    rope_factors,
)
from edgedistill.hyperparameters import hyperparameters
from edgedistill.tensors import Layout, Tensor, read_layout

ROWS = 64  # of each matrix that are compared
# Keys that say nothing about what is computed.
SILENT = ("tensor_data_layout", "rope.scaling.finetuned", "vocab_size")
HEAD_KEYS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1; Llama 3.2


def complete_config(reader: Any, folder: Path) -> None:
    """Write into config.json what the `gguf.GGUFReader` says and transformers left out."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    architecture, keys = _keys(reader)
    found = {"llama": _llama, "gemma3": _gemma3, "phi3": _phi3}.get(architecture)
    changes = {} if found is None else found(config, keys, reader)
    if any(config.get(name) != value for name, value in changes.items()):
        write_json(file, config | changes)


def check_student(reader: Any, folder: Path, source: Path) -> None:
    """Compare hyperparameters, tensor names and the first rows of each tensor with the GGUF's.

    Raises:
        WeightsError: the checkpoint is another model than the GGUF.
    """
    try:
        layout = read_layout(folder, "F32")
    except ArtifactError as error:
        _refuse(source, error.what, error)
    _, keys = _keys(reader)
    _same_keys(layout, keys, source)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    odd = sorted(stored.keys() ^ {tensor.name for tensor in layout.tensors})
    if odd:
        _refuse(source, f"transformers reads it with other tensors: {', '.join(odd[:3])}")
    for tensor in layout.tensors:
        if not _same_rows(tensor, stored[tensor.name]):
            _refuse(source, f"transformers reads {tensor.name} with other values")


def _keys(reader: Any) -> tuple[str, dict[str, Any]]:
    """The architecture, and its keys without that prefix."""
    architecture = str(reader.fields["general.architecture"].contents())
    prefix = f"{architecture}."
    own = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    return architecture, own


def _same_keys(layout: Layout, keys: Mapping[str, Any], source: Path) -> None:
    wanted: dict[str, Any] = dict(hyperparameters(layout))
    wanted["context_length"] = layout.config["max_position_embeddings"]
    wanted = dict.fromkeys(HEAD_KEYS, head_size(layout.config)) | wanted
    for name, value in keys.items():
        if name in SILENT:
            continue
        if name not in wanted:
            _refuse(source, f"its key {name} ({value}) is not known to edgedistill")
        own = wanted[name]
        same = own == value if isinstance(value, str) else math.isclose(own, value, rel_tol=1e-6)
        if not same:
            _refuse(source, f"transformers reads {name} as {own}, but the file says {value}")


def _same_rows(tensor: Tensor, stored: Any) -> bool:
    from gguf import dequantize

    own = next(tensor.blocks())[:ROWS]
    found = dequantize(stored.data[: len(own)], stored.tensor_type)
    if tuple(reversed(stored.shape.tolist())) != tensor.shape:
        return False
    return bool(np.allclose(own, found, rtol=1e-6, atol=1e-7))


def _linear(keys: Mapping[str, Any]) -> dict[str, Any]:
    if keys.get("rope.scaling.type") != "linear":
        return {}
    return {"rope_type": "linear", "factor": keys["rope.scaling.factor"]}


def _llama(config: Mapping[str, Any], keys: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    own = {**(config.get("rope_parameters") or rope(config)), **_linear(keys)}
    factors = _values(reader, "rope_freqs.weight")
    if factors is not None:
        for factor in LLAMA3_FACTORS:
            tried = own | {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            (made,) = rope_factors({**config, "rope_parameters": tried}).values()
            if np.allclose(made, factors, rtol=1e-6):
                return {"rope_parameters": tried}
    return {"rope_parameters": own} if own["rope_type"] == "linear" else {}


def _gemma3(config: Mapping[str, Any], keys: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    layers = keys["block_count"]
    full = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    width, heads = keys["embedding_length"], keys["attention.head_count"]
    return {
        "query_pre_attn_scalar": (
            width // heads if layers == GEMMA_27B_LAYERS else keys["attention.key_length"]
        ),
        "layer_types": gemma_layer_types(layers),
        "sliding_window": keys["attention.sliding_window"],
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "rope_parameters": {"full_attention": full | _linear(keys), "sliding_attention": local},
    }


def _phi3(config: Mapping[str, Any], keys: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    share = keys["rope.dimension_count"] / head_size(config)
    original = keys.get("rope.scaling.original_context_length", keys["context_length"])
    own: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": share,
    }
    long, short = (_values(reader, f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long is not None and short is not None:
        own |= {
            "rope_type": "longrope",
            "long_factor": [float(value) for value in long],
            "short_factor": [float(value) for value in short],
            "original_max_position_embeddings": original,
            "attention_factor": keys.get("rope.scaling.attn_factor", 1.0),
        }
    return {
        "rope_parameters": own,
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _values(reader: Any, name: str) -> Any:
    return next((tensor.data for tensor in reader.tensors if tensor.name == name), None)


def _refuse(where: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise WeightsError(what, where=str(where), hint="choose another student.weights") from cause
