"""An estimate for a device that is not at hand: how fast its memory and compute let it be.

Williams, Waterman, Patterson 2009 (the roofline model). Decoding a token reads every weight once,
so bandwidth bounds it; prefill multiplies every weight with every token, so compute bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import RuntimeFailure
from edgedistill.results import Estimate
from edgedistill.runtimes import ONNX, open_runtime
from edgedistill.target import Roofline

KV_BYTES = 2  # llama.cpp keeps keys and values in f16 unless told otherwise
MAY_STAND = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "expert_count",
    "expert_used_count",
)  # fmt: skip
EMBEDDING = "token_embd.weight"
EXPERTS = "_exps."  # in the name of a tensor that holds all of a block's
FIELDS = {"roofline", *Roofline.model_fields}
FORMULA = (
    "decode tokens/s = efficiency x bandwidth / (weight bytes read per token + KV bytes at the "
    "mean context); prefill tokens/s = compute / (2 x parameters multiplied with every token of "
    "the prompt); end to end = prompt / prefill + (answer - 1) / decode; an untied input embedding "
    "is not read, llama.cpp multiplies the head with a prompt's last token alone, and of experts "
    "those in use count"
)


@dataclass(frozen=True)
class Load:
    """What one token costs a model: `weight_bytes` read in decoding, `parameters` multiplied with
    each token of a prompt, and KV bytes a context token."""

    weight_bytes: int
    parameters: int
    kv_bytes_per_token: int


def load_of(model: Path) -> Load:
    """The load of a GGUF file, from its tensor table (no tensor is read into memory), or of an ONNX
    model folder.

    Raises:
        RuntimeFailure: neither, or one without the usual keys.
    """
    if model.is_dir():
        with open_runtime(ONNX, model, context_tokens=64) as runtime:
            facts, keys = runtime.facts, runtime.metadata()
        try:
            return onnx_load(facts, keys)
        except (KeyError, ValueError) as error:
            raise RuntimeFailure(f"its sizes are not told: {error}", where=str(model)) from error
    from gguf import GGUFReader

    try:
        reader = GGUFReader(model)
        sizes = {t.name: (int(t.n_bytes), int(t.n_elements)) for t in reader.tensors}
        names = ("block_count", "embedding_length", "attention.head_count")
        arch = reader.fields["general.architecture"].contents()
        needed = {name: reader.fields[f"{arch}.{name}"].contents() for name in names}
        given = {n: f.contents() for n in MAY_STAND if (f := reader.fields.get(f"{arch}.{n}"))}
        return load_from(sizes, {**needed, **given})
    except (OSError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise RuntimeFailure(f"not a GGUF file we can size: {error}", where=str(model)) from error


def onnx_load(facts: Mapping[str, Any], keys: Mapping[str, str]) -> Load:
    """The load from a runtime's facts and genai_config.json's keys; its KV cache is fp32, and its
    graph multiplies the head with every token of a prompt."""
    looked_up = facts["lookup_parameters"]
    layers, heads, size = (
        int(keys[f"model.decoder.{name}"])
        for name in ("num_hidden_layers", "num_key_value_heads", "head_size")
    )
    return Load(
        weight_bytes=facts["size"] - 4 * looked_up,
        parameters=facts["parameters"] - looked_up,
        kv_bytes_per_token=2 * layers * heads * size * 4,
    )


def load_from(sizes: Mapping[str, tuple[int, int]], keys: Mapping[str, Any]) -> Load:
    """The load from `{tensor: (bytes, elements)}` and the architecture's keys.

    With an `output.weight` the input embedding is only looked up, one row a token; without one it
    is tied and read in full as the head. llama.cpp multiplies the head with those tokens alone
    whose logits are asked for, of a prompt the last. Of experts a token reads those it is sent to.
    """
    head = "output.weight" if "output.weight" in sizes else EMBEDDING
    used = keys["expert_used_count"] / keys["expert_count"] if keys.get("expert_count") else 1.0
    read = {
        name: (size * used, count * used) if EXPERTS in name else (size, count)
        for name, (size, count) in sizes.items()
        if name == head or name != EMBEDDING
    }
    heads = keys["attention.head_count"]
    head_width = keys["embedding_length"] // (max(heads) if isinstance(heads, list) else heads)
    kv_heads = keys.get("attention.head_count_kv", heads)
    blocks = keys["block_count"]
    total = sum(kv_heads) if isinstance(kv_heads, list) else kv_heads * blocks
    width = sum(keys.get(f"attention.{each}_length", head_width) for each in ("key", "value"))
    return Load(
        weight_bytes=round(sum(size for size, _ in read.values())),
        parameters=round(sum(count for name, (_, count) in read.items() if name != head)),
        kv_bytes_per_token=total * width * KV_BYTES,
    )


def estimate(
    load: Load,
    roofline: Roofline,
    prompt_tokens: float,
    answer_tokens: float,
    sources: Mapping[str, str],
) -> Estimate:
    """Roofline estimate for prompts and answers of these (median) lengths, stop token counted."""
    context = prompt_tokens + answer_tokens / 2
    bytes_read = round(load.weight_bytes + load.kv_bytes_per_token * context)
    decode = roofline.efficiency * roofline.bandwidth_gb_s * 1e9 / bytes_read
    prefill = roofline.compute_gflops * 1e9 / (2 * load.parameters)
    first = prompt_tokens / prefill
    return Estimate(
        tokens_per_second=decode,
        prefill_tokens_per_second=prefill,
        time_to_first_token=first,
        end_to_end_p50=first + max(answer_tokens - 1, 0) / decode,
        bytes_read_per_token=bytes_read,
        formula=FORMULA,
        sources={k: v for k, v in sources.items() if k.split(".")[-1] in FIELDS},
    )
