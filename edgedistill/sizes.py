"""How large a student is, by what is on this machine of it: a GGUF header or a config.json. Of
pinned weights it is known without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.errors import WeightsError
from edgedistill.gguf_header import read_header
from edgedistill.hf_config import require_student
from edgedistill.methods import LoraSpec
from edgedistill.training.need import Dimensions, dimensions_of
from edgedistill.weights import KNOWN, HubModel, cached, folder_or_hub

EMBEDDING = "token_embd.weight"
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
# What the headers of pinned students say, so that a recipe is refused before they are fetched.
PINNED: Mapping[str, tuple[int, ...]] = {
    "qwen2.5-coder-1.5b-instruct-q4_k_m": (28, 1536, 8960, 12, 2, 151936, False),
    "qwen2.5-coder-0.5b-instruct-q4_k_m": (24, 896, 4864, 14, 2, 151936, False),
    "smollm2-135m-instruct-q4_1": (30, 576, 1536, 9, 3, 49152, True),
}


def known_dimensions(name: str) -> Dimensions | None:
    """Of a student's weights; None where they are neither on this machine nor in PINNED.

    Raises:
        WeightsError, ArtifactError: they cannot be a student's.
    """
    if name.lower().endswith(".gguf"):
        return of_header(Path(name))
    place = folder_or_hub(name)
    if name in PINNED:
        return dimensions_of(dict(zip(SIZES, PINNED[name], strict=True)))
    if place is None:
        here = cached(name) if name in KNOWN else None
        return None if here is None else of_header(here)
    if isinstance(place, HubModel) and not place.complete:
        return None
    return dimensions_of(
        require_student(place.folder if isinstance(place, HubModel) else place).model
    )


def rank_problem(lora: LoraSpec, weights: str, found: Dimensions | None) -> str:
    """Why so large a rank cannot be; "" where it can, or where the size is not known."""
    if found is None or lora.rank <= found.narrowest:
        return ""
    return f"is {lora.rank}, and a layer of {weights} is only {found.narrowest} wide"


def of_header(file: Path) -> Dimensions:
    """Of a GGUF file.

    Raises:
        WeightsError, ArtifactError: it cannot be a student's.
    """
    header = read_header(file)

    def number(key: str, default: int = 0) -> int:
        return int(header.keys.get(f"{header.architecture}.{key}", default))

    heads, width = number("attention.head_count"), number("embedding_length")
    vocabulary = number("vocab_size")
    if EMBEDDING not in header.by_name:
        raise WeightsError(f"it has no {EMBEDDING}", where=str(file), hint="choose another student")
    shape = header.by_name[EMBEDDING].shape
    found: Mapping[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length") or width // heads,
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "vocab_size": vocabulary or max(shape),
        "tie_word_embeddings": "output.weight" not in header.by_name,
    }
    return dimensions_of(found)
