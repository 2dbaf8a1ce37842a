"""Which number format each matrix gets: the least loss that fits into a budget of bytes.

Losses are taken as additive over matrices, which makes this the multiple-choice knapsack problem;
it is solved exactly by dynamic programming over bytes (Dudzinski and Walukiewicz 1987).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.artifacts import (
    Allocation,
    Checkpoint,
    Identity,
    Importance,
    Sensitivity,
    run_stage,
    write_json,
)
from edgedistill.errors import ConfigError, Problem
from edgedistill.number_formats import stored_bytes, usable
from edgedistill.progress import Progress
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.target import AllocationSpec, Target
from edgedistill.tensors import Layout, matrices, read_layout

TYPES, IMPORTANCE = "allocation.json", "importance.gguf"
STEPS = 16_384  # the budget is counted in so many equal parts
EMBEDDING = "token_embd.weight"
KEYS_BYTES = 8_192  # keys of a GGUF file beside its tokenizer's, with room to spare
TENSOR_BYTES = 160  # name, shape, type and offset of one tensor, and padding in front of its data


def allocate(
    checkpoint: Checkpoint,
    sensitivity: Sensitivity | None,
    importance: Importance | None,
    spec: AllocationSpec,
    target: Target,
    out: Path,
    progress: Progress,
) -> Allocation:
    """Stage "allocate": the type of each matrix. With one type there is nothing to choose.

    Raises:
        ConfigError: even the smallest choice is larger than the budget.
    """
    layout = read_layout(checkpoint.folder)
    budget = None if sensitivity is None else budget_bytes(spec, target, layout)
    identity = Identity(
        stage="allocate",
        version=1,
        spec={"types": list(spec.types), "embedding": spec.embedding, "budget": budget},
        inputs={
            "checkpoint": checkpoint.digest,
            **({} if sensitivity is None else {"sensitivity": sensitivity.digest}),
            **({} if importance is None else {"importance": importance.digest}),
        },
    )

    def work(folder: Path) -> Mapping[str, Any]:
        chosen, facts = _chosen(checkpoint.folder, layout, sensitivity, spec, budget)
        write_json(folder / TYPES, chosen)
        if importance is not None:
            shutil.copyfile(importance.file, folder / IMPORTANCE)
        return facts

    done = run_stage(identity, out, progress, work)
    types = json.loads((done.folder / TYPES).read_text("utf-8"))
    kept = done.folder / IMPORTANCE
    return Allocation(done.folder, done.digest, types, kept if kept.is_file() else None)


def _chosen(
    folder: Path,
    layout: Layout,
    sensitivity: Sensitivity | None,
    spec: AllocationSpec,
    budget: int | None,
) -> tuple[dict[str, str], dict[str, Any]]:
    shapes = {name: shape[1:] for name, shape in matrices(layout).items()}
    offered = {name: _offered(name, shape[1], spec) for name, shape in shapes.items()}
    sizes = {
        name: {kind: stored_bytes(*shapes[name], kind) for kind in kinds}
        for name, kinds in offered.items()
    }
    rest = other_bytes(folder, layout)
    if sensitivity is None or budget is None:
        chosen = {name: kinds[0] for name, kinds in offered.items()}
        loss = None
    else:
        costs = json.loads(sensitivity.file.read_text("utf-8"))
        chosen = solve(sizes, costs, budget - rest, spec, rest)
        loss = sum(costs[name][kind] for name, kind in chosen.items())
    planned = rest + sum(sizes[name][kind] for name, kind in chosen.items())
    return chosen, {"planned_bytes": planned, "budget_bytes": budget, "predicted_kld": loss}


def _offered(name: str, columns: int, spec: AllocationSpec) -> list[str]:
    """Types that llama.cpp can really store this matrix in, each once."""
    types = (spec.embedding,) if spec.embedding and name == EMBEDDING else spec.types
    return list(dict.fromkeys(usable(kind, columns) for kind in types))


def solve(
    sizes: Mapping[str, Mapping[str, int]],
    costs: Mapping[str, Mapping[str, float]],
    budget: int,
    spec: AllocationSpec,
    rest: int = 0,
) -> dict[str, str]:
    """The type of each tensor with the least sum of `costs`, of `sizes` bytes in all <= `budget`.

    `rest`: bytes of a file that are no matrix, for the error message alone.

    Raises:
        ConfigError: no choice is small enough.
    """
    smallest = sum(min(by_type.values()) for by_type in sizes.values())
    if smallest > budget:
        _refuse(spec, smallest + rest, budget + rest)
    # Bytes beyond the smallest choice are what is spent; sizes round up, so nothing overflows.
    unit = max(1, -(-(budget - smallest) // STEPS))
    least = np.zeros((budget - smallest) // unit + 1)
    picks: list[tuple[str, list[str], Any]] = []
    for name, by_type in sizes.items():
        kinds, base = list(by_type), min(by_type.values())
        tried = np.full((len(kinds), len(least)), np.inf)
        for row, kind in enumerate(kinds):
            step = -(-(by_type[kind] - base) // unit)
            if step < len(least):
                tried[row, step:] = least[: len(least) - step] + costs[name][kind]
        picks.append((name, kinds, tried.argmin(0)))
        least = tried.min(0)
    return _walked_back(picks, sizes, unit, len(least) - 1)


def _walked_back(
    picks: list[tuple[str, list[str], Any]],
    sizes: Mapping[str, Mapping[str, int]],
    unit: int,
    left: int,
) -> dict[str, str]:
    chosen = {}
    for name, kinds, pick in reversed(picks):
        kind = kinds[pick[left]]
        chosen[name] = kind
        left -= -(-(sizes[name][kind] - min(sizes[name].values())) // unit)
    return {name: chosen[name] for name in sizes}


def _refuse(spec: AllocationSpec, smallest: int, budget: int) -> None:
    raise ConfigError(
        [
            Problem(
                "target",
                0,
                f"allocations.{spec.name}",
                f"the budget of {budget / 1e6:.1f} MB is below the smallest file that these types "
                f"make, {smallest / 1e6:.1f} MB; raise it, add smaller types, or set vocabulary or "
                "drop_layers",
            )
        ]
    )


def budget_bytes(spec: AllocationSpec, target: Target, layout: Layout) -> int | None:
    """Bytes of the whole file that the spec allows; None without a budget."""
    if spec.budget_mb is not None:
        return int(spec.budget_mb * 1e6)
    if spec.budget_tokens_per_second is None or target.roofline is None:
        return None
    roofline, config = target.roofline, layout.config
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    cache = 4 * config["num_hidden_layers"] * kv_heads * head * target.context_tokens // 2
    rate = roofline.efficiency * roofline.bandwidth_gb_s * 1e9
    allowed = int(rate / spec.budget_tokens_per_second)
    return allowed - int(cache)


def other_bytes(folder: Path, layout: Layout) -> int:
    """Bytes of a GGUF file beside its matrices: norms and biases in f32, keys, tokenizer."""
    named = matrices(layout)
    small = sum(int(np.prod(t.shape)) * 4 for t in layout.tensors if t.name not in named)
    keys = json.loads((folder / TOKENIZER_GGUF).read_text("utf-8"))
    texts = sum(_key_bytes(entry["value"]) + len(entry["key"]) + 24 for entry in keys)
    return small + texts + len(layout.tensors) * TENSOR_BYTES + KEYS_BYTES


def _key_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode()) + 8
    if isinstance(value, list):
        return sum(_key_bytes(each) for each in value)
    return 4
