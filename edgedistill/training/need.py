"""Memory and arithmetic of a training run, before it begins: what it needs, and how it is cut so
that it fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.errors import TrainingError, WeightsError
from edgedistill.families import known_names
from edgedistill.methods import DistillSpec
from edgedistill.training.data import CHUNK_BYTES, PART_TOKENS

# Smallest parts that still keep the device busy; below that activations are computed twice.
BUSY_TOKENS = {"cpu": 128, "cuda": 2048}
RUNTIME_BYTES = 700_000_000  # of Python, torch and its kernels
# Of one token in one layer, in numbers kept for the backward pass: so many widths of the residual
# stream, of the MLP and of attention's queries, keys and values. An upper bound over the families:
# 1.05 to 1.5 times what tests/test_need.py counts.
RESIDUAL, MLP, ATTENTION = 7, 3, 5.5
WHOLE = 1.3  # where every matrix is trained, its inputs are kept, too
# Of fp32's bytes: norms and the residual stream stay in fp32 on a CPU; on a GPU it is less.
BF16 = 0.7
ADAM = 16  # bytes of a trained parameter: itself, its gradient and two moments
FOUR_BIT = 0.57  # bytes of a 4-bit weight with its scales
LOGITS_COPIES = 3
NEEDED = (
    "num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """What of a checkpoint decides the memory and arithmetic of its training."""

    layers: int
    width: int
    mlp: int
    attention: int  # of queries, keys and values together
    queries: int
    vocabulary: int
    parameters: int
    tied: bool

    @property
    def narrowest(self) -> int:
        """The smaller side of the narrowest linear map: keys and values, where heads share them."""
        return min(self.width, self.queries, self.mlp, (self.attention - self.queries) // 2)

    @property
    def matrices(self) -> int:
        """Parameters of the layers' linear maps, about: all but embedding and head."""
        return self.parameters - self.width * self.vocabulary * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all linear maps."""
        sides = 7 * self.width + self.attention + self.queries + 3 * self.mlp
        return self.layers * rank * sides


@dataclass(frozen=True)
class Cut:
    """How batches are computed: `tokens` at once, activations kept or not; and the bytes for it."""

    tokens: int
    checkpointing: bool
    bytes: int


def dimensions(folder: Path) -> Dimensions:
    """Of a checkpoint folder in fp32."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return replace(dimensions_of(config), parameters=size // 4)


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """Of what a config.json says; parameters but for norms and biases.

    Raises:
        WeightsError: it lacks what all our families have.
    """
    absent = [name for name in NEEDED if name not in config]
    if absent:
        raise WeightsError(
            f"its config.json has no {absent[0]}", hint=f"choose another student: {known_names()}"
        )
    heads, width, mlp = (
        config[name] for name in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    head = config.get("head_dim") or width // heads
    keys = config.get("num_key_value_heads") or heads
    layers, attention = config["num_hidden_layers"], head * (heads + 2 * keys)
    tied = bool(config.get("tie_word_embeddings"))
    layer = width * attention + head * heads * width + 3 * width * mlp
    embeddings = config["vocab_size"] * width * (1 if tied else 2)
    return Dimensions(
        layers=layers,
        width=width,
        mlp=mlp,
        attention=attention,
        queries=head * heads,
        vocabulary=config["vocab_size"],
        parameters=layers * layer + embeddings,
        tied=tied,
    )


def activation_bytes(found: Dimensions, spec: DistillSpec, tokens: int, checkpointing: bool) -> int:
    """What is kept for the backward pass of so many tokens."""
    attention = (found.attention + found.queries) / 2  # queries, and keys or values
    numbers = RESIDUAL * found.width + MLP * found.mlp + ATTENTION * attention
    layer = 4 * numbers * (BF16 if spec.precision == "bf16" else 1)
    layer *= WHOLE if spec.tuning == "full" else 1
    if not checkpointing:
        return int(tokens * found.layers * layer)
    return int(tokens * (found.layers * 4 * found.width + layer))


def needed_bytes(found: Dimensions, spec: DistillSpec, tokens: int, checkpointing: bool) -> int:
    """Estimated peak of a process or, with a GPU, on it."""
    trained = found.parameters if spec.tuning == "full" else found.adapter(spec.lora.rank)
    each = 2.0 if spec.precision == "bf16" else 4.0
    rest = found.parameters - found.matrices
    layers = {"full": 0.0, "qlora": FOUR_BIT * found.matrices}.get(
        spec.tuning, each * found.matrices
    )
    embeddings = {"full": 0, "qlora": 2 * rest}.get(spec.tuning, 4 * rest)
    logits = LOGITS_COPIES * min(CHUNK_BYTES, 4 * tokens * found.vocabulary)
    activations = activation_bytes(found, spec, tokens, checkpointing)
    held = layers + activations
    if spec.shard and spec.processes > 1:
        # Two layers are whole at a time; all of them while validation answers are made.
        shares = layers / spec.processes + 2 * layers / found.layers
        held = max(shares + activations, layers)
    return int(held + embeddings + ADAM * trained + logits + RUNTIME_BYTES)


def loading_bytes(found: Dimensions) -> int:
    """What loading takes of this machine's memory: the checkpoint is fp32, also for a GPU."""
    return 4 * found.parameters + RUNTIME_BYTES


def cut(
    found: Dimensions,
    spec: DistillSpec,
    rows: Sequence[Any],
    device_type: str,
    free: int | None,
    host: int | None = None,
) -> Cut:
    """The largest parts that fit into `free` bytes (None: unknown) of the device, activations kept
    where the recipe lets us and they can be; `host` is what this machine has free.

    Raises:
        TrainingError: nothing fits.
    """
    load = loading_bytes(found)
    if host is not None and load > host:
        raise TrainingError(
            f"loading the model takes {load / 1e9:.1f} GB of memory, and {host / 1e9:.1f} GB are "
            "free",
            hint="close other programs, train in fewer processes, or take a smaller student",
        )
    longest, most = max(map(len, rows)), PART_TOKENS[device_type]
    least = max(longest, BUSY_TOKENS[device_type])
    sizes = [max(longest, most >> halved) for halved in range(int(math.log2(most)))]
    sizes = sorted({size for size in sizes if size >= least}, reverse=True) or [longest]
    kinds = {"auto": (False, True), "on": (True,), "off": (False,)}[spec.gradient_checkpointing]
    tried = [
        Cut(size, kind, needed_bytes(found, spec, size, kind)) for kind in kinds for size in sizes
    ]
    tried += [Cut(longest, kind, needed_bytes(found, spec, longest, kind)) for kind in kinds]
    for each in tried:
        if free is None or each.bytes <= free:
            return each
    need = min(each.bytes for each in tried)
    raise TrainingError(
        f"training needs about {need / 1e9:.1f} GB of memory, and {(free or 0) / 1e9:.1f} GB are "
        "free",
        hint=_cheaper(spec),
    )


def fit_here(folder: Path, spec: DistillSpec, rows: Sequence[Any], device_type: str) -> Cut:
    """How batches of rows are computed in the memory that is free on this machine now; `folder`
    is the checkpoint's.

    Raises:
        TrainingError: it does not suffice.
    """
    host = free_memory()
    own = None if host is None else host // spec.processes
    free = own if device_type == "cpu" else free_bytes(device_type)
    return cut(dimensions(folder), spec, rows, device_type, free, own)


def _cheaper(spec: DistillSpec) -> str:
    ways = []
    if spec.tuning == "full":
        ways.append("set distill.tuning to lora")
    if spec.gradient_checkpointing == "off":
        ways.append("set distill.gradient_checkpointing to auto")
    if spec.precision == "fp32":
        ways.append("set distill.precision to bf16")
    return ", ".join([*ways, "close other programs", "or take a smaller student"])


def free_bytes(device_type: str) -> int | None:
    """Memory that training may take: the GPU's, or this machine's; None where it is not known."""
    if device_type == "cuda":
        import torch

        kept = int(torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
        return int(torch.cuda.mem_get_info()[0]) + kept
    return free_memory()


def free_memory() -> int | None:
    """Of this machine, in bytes, a container's bounds included; None where it is not known."""
    import psutil

    from edgedistill import machine

    bound = machine.memory_bytes()
    return None if bound is None else min(bound, int(psutil.virtual_memory().available))
