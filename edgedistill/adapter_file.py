"""Does a LoRA GGUF fit a model? Asked of the two headers, before llama.cpp is.

llama.cpp refuses a wrong adapter too, but its reasons are for those who write converters.
Source: llama.cpp's src/llama-adapter.cpp, llama_adapter_lora_init_impl.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from edgedistill.errors import ArtifactError, RuntimeFailure
from edgedistill.gguf_header import Header, read_header

A, B = ".lora_a", ".lora_b"
EMBEDDING = "token_embd.weight"


def require_fit(adapter: Path, model: Path) -> None:
    """Refuse an adapter that was made for another model than `model` (two GGUF files).

    Raises:
        RuntimeFailure: not a LoRA adapter, another architecture, a tensor that the model has not,
            or one of another shape. Which model it was made for is said where the file tells.
    """
    try:
        lora, base = read_header(adapter), read_header(model)
    except (ArtifactError, OSError) as error:
        raise RuntimeFailure(f"adapter: {error}") from error
    kind = lora.keys.get("general.type"), lora.keys.get("adapter.type")
    if kind != ("adapter", "lora"):
        _refuse(adapter, lora, f"general.type and adapter.type are {kind[0]} and {kind[1]}")
    if lora.architecture != base.architecture:
        what = f"it is for the architecture {lora.architecture}, the model is {base.architecture}"
        _refuse(adapter, lora, what)
    for name in sorted({name.removesuffix(A).removesuffix(B) for name in lora.by_name}):
        reason = _misfit(name, lora, base)
        if reason:
            _refuse(adapter, lora, reason)


def _misfit(name: str, lora: Header, base: Header) -> str:
    """Why the pair of `name` cannot be added to the model; "" when it can."""
    if name + A not in lora.by_name or name + B not in lora.by_name:
        return f"tensor {name} has only one of {A} and {B}"
    if name not in base.by_name:
        return f"the model has no tensor {name}"
    a, b = lora.by_name[name + A].shape, lora.by_name[name + B].shape
    # (rank, columns) and (rows, rank); A of an embedding is transposed: (vocabulary, rank).
    made_for = (b[0], a[1]) if name != EMBEDDING else (a[0], b[0])
    ranks = (a[0], b[1]) if name != EMBEDDING else (a[1], b[1])
    if ranks[0] != ranks[1]:
        return f"tensor {name} has ranks {ranks[0]} and {ranks[1]}"
    if made_for != base.by_name[name].shape:
        return f"tensor {name} is {base.by_name[name].shape} in the model, not {made_for}"
    return ""


def _refuse(adapter: Path, lora: Header, what: str) -> NoReturn:
    base = lora.keys.get("general.base_model.0.name")
    made_for = f"it was made for {base}" if base else "it does not say which model it is for"
    raise RuntimeFailure(
        f"this adapter does not fit the model: {what}",
        where=str(adapter),
        hint=f"{made_for}; use it with that model, or make one for this model",
    )
