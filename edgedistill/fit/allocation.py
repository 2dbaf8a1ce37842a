"""Which number format each matrix gets: the least loss that fits into a budget of bytes.

Losses are taken as additive over matrices, which makes this the multiple-choice knapsack problem;
it is solved by dynamic programming over bytes (Dudzinski and Walukiewicz 1987), which it counts in
parts of a 16,384th of the budget.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.allocations import BUDGETS, AllocationSpec
from edgedistill.artifacts import (
    Allocation,
    Checkpoint,
    Identity,
    Importance,
    Sensitivity,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.errors import ConfigError, Problem
from edgedistill.fit.proposals import search
from edgedistill.footprint import CACHE_BYTES, largest_size, shape_of_layout
from edgedistill.number_formats import stored_bytes, usable
from edgedistill.onnx_builder import own_tokenizer
from edgedistill.onnx_nodes import nodes_of
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER_CONFIG
from edgedistill.quantized_values import stored_together
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.target import Target
from edgedistill.tensors import Layout, matrices, read_layout

TYPES, IMPORTANCE = "allocation.json", "importance.gguf"
STEPS = 16_384  # the budget is counted in so many equal parts
EMBEDDING = "token_embd.weight"
BY_TOKEN = (EMBEDDING, "output.weight")  # a row of each for each token
BLOCK = re.compile(r"^blk\.(\d+)\.")
KEYS_BYTES = 8_192  # keys of a GGUF file beside its tokenizer's, with room to spare
ONNX_BYTES, ONNX_LAYER_BYTES = 16_384, 8_192  # of a graph and its settings, with room to spare
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
    budget = None if sensitivity is None else budget_bytes(spec, target, layout, checkpoint.folder)
    identity = Identity(
        stage="allocate",
        version=2,
        spec={
            "types": list(spec.types),
            "embedding": spec.embedding,
            "budget": budget,
            "kernels": list(target.kernels),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            **({} if sensitivity is None else {"sensitivity": sensitivity.digest}),
            **({} if importance is None else {"importance": importance.digest}),
        },
        tools={} if sensitivity is None else tool_versions("torch", "llama-cpp-python"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        chosen, facts = _Choice(checkpoint.folder, layout, spec, target, budget).made(
            sensitivity, importance, progress
        )
        write_json(folder / TYPES, chosen)
        if importance is not None:
            shutil.copyfile(importance.file, folder / IMPORTANCE)
        return facts

    done = run_stage(identity, out, progress, work)
    types = json.loads((done.folder / TYPES).read_text("utf-8"))
    kept = done.folder / IMPORTANCE
    return Allocation(done.folder, done.digest, types, kept if kept.is_file() else None)


@dataclass(frozen=True)
class _Choice:
    folder: Path
    layout: Layout
    spec: AllocationSpec
    target: Target
    budget: int | None

    def made(
        self, sensitivity: Sensitivity | None, importance: Importance | None, progress: Progress
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The type of each matrix, and facts."""
        together = stored_together(self.layout, self.spec.onnx)
        shapes = {n: shape[1:] for n, shape in matrices(self.layout).items() if n in together}
        offered = {
            name: _offered(name, shape[1], self.spec, self.target.kernels)
            for name, shape in shapes.items()
        }
        sizes = {
            name: {kind: stored_bytes(*shapes[name], kind) for kind in kinds}
            for name, kinds in offered.items()
        }
        other = other_onnx_bytes if self.spec.onnx else other_bytes
        rest, loss = other(self.folder, self.layout), None
        if sensitivity is None or self.budget is None:
            chosen = {name: kinds[0] for name, kinds in offered.items()}
        else:
            chosen, loss = self._searched(sizes, rest, together, sensitivity, importance, progress)
        planned = rest + sum(sizes[name][kind] for name, kind in chosen.items())
        facts = {"planned_bytes": planned, "budget_bytes": self.budget, "mean_kld": loss}
        return chosen, facts

    def _searched(
        self,
        sizes: Mapping[str, Mapping[str, int]],
        rest: int,
        together: Mapping[str, str],
        sensitivity: Sensitivity,
        importance: Importance | None,
        progress: Progress,
    ) -> tuple[dict[str, str], float]:
        costs = json.loads(sensitivity.file.read_text("utf-8"))
        asked = json.loads(sensitivity.asked.read_text("utf-8"))
        budget = (self.budget or 0) - rest
        smallest = _smallest(sizes)
        if smallest > budget:
            raise _too_small(self.spec, self.target, smallest + rest, budget + rest, "")

        def propose(offered: Mapping[str, Mapping[str, int]]) -> dict[str, str] | None:
            if _smallest(offered) > budget:
                return None
            return solve_together(offered, costs, budget, together)

        return search(self.folder, asked, importance, sizes, propose, progress, self.spec.onnx)


def _smallest(sizes: Mapping[str, Mapping[str, int]]) -> int:
    return sum(min(by_type.values()) for by_type in sizes.values())


def _offered(name: str, columns: int, spec: AllocationSpec, kernels: Sequence[str]) -> list[str]:
    """Types that llama.cpp can really store this matrix in, each once; a fallback without a fast
    kernel only where there is nothing else."""
    types = (spec.embedding,) if spec.embedding and name == EMBEDDING else spec.types
    stored = list(dict.fromkeys(usable(kind, columns) for kind in types))
    return [kind for kind in stored if kind in kernels] or stored


def solve_together(
    sizes: Mapping[str, Mapping[str, int]],
    costs: Mapping[str, Mapping[str, float]],
    budget: int,
    together: Mapping[str, str],
) -> dict[str, str]:
    """`solve` where the tensors of one group of `together` get one type."""
    size: dict[str, dict[str, int]] = {}
    cost: dict[str, dict[str, float]] = {}
    for name, by_type in sizes.items():
        group = together[name]
        all_bytes, all_costs = size.setdefault(group, {}), cost.setdefault(group, {})
        for kind, count in by_type.items():
            all_bytes[kind] = all_bytes.get(kind, 0) + count
            all_costs[kind] = all_costs.get(kind, 0.0) + costs[name][kind]
    chosen = solve(size, cost, budget)
    return {name: chosen[together[name]] for name in sizes}


def solve(
    sizes: Mapping[str, Mapping[str, int]],
    costs: Mapping[str, Mapping[str, float]],
    budget: int,
) -> dict[str, str]:
    """The type of each tensor with the least sum of `costs`, of `sizes` bytes in all <= `budget`,
    which the smallest choice must fit into."""
    smallest = _smallest(sizes)
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


def require_allocatable(folder: Path, spec: AllocationSpec, target: Target) -> None:
    """Refuse, before anything is trained, a type for an embedding that the runtime keeps as it is,
    and a budget below what the smallest types make of the checkpoint in `folder` at least: what a
    trimmed vocabulary keeps is only known later.

    Raises:
        ConfigError: names the field, and the budget with that size.
    """
    layout = cut(read_layout(folder), spec)
    together = stored_together(layout, spec.onnx)
    if spec.onnx and spec.embedding and EMBEDDING not in together:
        raise _no_embedding(spec, target)
    budget = budget_bytes(spec, target, layout, folder)
    if budget is None:
        return
    shapes = {name: shape[1:] for name, shape in matrices(layout).items() if name in together}
    smallest = sum(
        min(stored_bytes(*shape, kind) for kind in _offered(name, shape[1], spec, target.kernels))
        for name, shape in shapes.items()
    )
    if smallest > budget:
        raise _too_small(spec, target, smallest, budget, "at least ")


def cut(layout: Layout, spec: AllocationSpec) -> Layout:
    """The layout as it will be at least, with the layers and vocabulary that the spec leaves."""
    config = layout.config
    layers = config["num_hidden_layers"] - spec.drop_layers
    rows = min(config["vocab_size"], spec.vocabulary or config["vocab_size"])
    kept = []
    for tensor in layout.tensors:
        block = BLOCK.match(tensor.name)
        if tensor.name in BY_TOKEN:
            kept.append(replace(tensor, shape=(rows, *tensor.shape[1:])))
        elif block is None or int(block[1]) < layers:
            kept.append(tensor)
    config = {**config, "num_hidden_layers": layers, "vocab_size": rows}
    return replace(layout, config=config, tensors=tuple(kept))


def _too_small(
    spec: AllocationSpec, target: Target, smallest: int, budget: int, bound: str
) -> ConfigError:
    field = next(name for name in BUDGETS if getattr(spec, name) is not None)
    rate = field == "budget_tokens_per_second"  # the one that a smaller number makes wider
    says = f"{getattr(spec, field):g}"
    unset = ["lower it" if rate else "raise it", "add smaller types"]
    if budget <= 0:
        alone = "take longer to read" if rate else "need more"
        says += f": cache and buffers alone {alone}, and the file"
        unset.append("lower context_tokens")
    elif field != "budget_mb":
        says += f", a file of {budget / 1e6:.1f} MB,"
    says += " adds" if budget <= 0 else " is below the smallest that these types make,"
    says += f" {bound}{smallest / 1e6:.1f} MB"
    if spec.vocabulary is None:
        unset.append("set vocabulary")
    if not spec.drop_layers:
        unset.append("set drop_layers")
    where = f"allocations.{spec.name}.{field}"
    text = f"{says}; {', or '.join(unset)}"
    return ConfigError([Problem(f"target {target.name}", 0, where, text)])


def _no_embedding(spec: AllocationSpec, target: Target) -> ConfigError:
    text = "this student's embedding is not its head, and ONNX keeps it as it is; leave this out"
    where = f"allocations.{spec.name}.embedding"
    return ConfigError([Problem(f"target {target.name}", 0, where, text)])


def budget_bytes(spec: AllocationSpec, target: Target, layout: Layout, folder: Path) -> int | None:
    """Bytes of the whole file that the spec allows; None without a budget."""
    if spec.budget_mb is not None:
        return int(spec.budget_mb * 1e6)
    if spec.budget_bits_per_weight is not None:
        return int(spec.budget_bits_per_weight * layout.parameters / 8)
    shape = shape_of_layout(layout)
    if spec.budget_memory_mb is not None:
        return largest_size(int(spec.budget_memory_mb * 1e6), shape, target)
    if spec.budget_tokens_per_second is None or target.roofline is None:
        return None
    # bench/roofline.py the other way round, for a context that is half full. An embedding beside a
    # head of its own counts as read, which it is not: the file comes out smaller than it might be.
    roofline = target.roofline
    cached = 2 * shape.layers * shape.kv_heads * shape.head_size * CACHE_BYTES[target.runtime]
    rate = roofline.efficiency * roofline.bandwidth_gb_s * 1e9
    read = int(rate / spec.budget_tokens_per_second) - cached * target.context_tokens // 2
    return read + _unread_bytes(spec, layout, folder)


def _unread_bytes(spec: AllocationSpec, layout: Layout, folder: Path) -> int:
    """Of the bytes beside the matrices those that no token needs: tokenizer, keys, graph."""
    other = other_onnx_bytes(folder, layout) if spec.onnx else other_bytes(folder, layout)
    return other - sum(4 * int(np.prod(t.shape)) for t in layout.tensors if len(t.shape) == 1)


def other_bytes(folder: Path, layout: Layout) -> int:
    """Bytes of a GGUF file beside its matrices: norms and biases in f32, keys, tokenizer."""
    named = matrices(layout)
    small = sum(int(np.prod(t.shape)) * 4 for t in layout.tensors if t.name not in named)
    keys = json.loads((folder / TOKENIZER_GGUF).read_text("utf-8"))
    texts = sum(_key_bytes(entry["value"]) + len(entry["key"]) + 24 for entry in keys)
    return small + texts + len(layout.tensors) * TENSOR_BYTES + KEYS_BYTES


def other_onnx_bytes(folder: Path, layout: Layout) -> int:
    """Bytes of an ONNX model folder beside its quantized matrices: what stays in fp32 (a head that
    is not tied leaves its embedding so), sines and cosines of all positions, graph, tokenizer."""
    config = layout.config
    plain = [t for t in layout.tensors if len(t.shape) == 1 or not nodes_of(t.name, config)]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tables = 4 * config["max_position_embeddings"] * head
    graph = ONNX_BYTES + ONNX_LAYER_BYTES * config["num_hidden_layers"]
    tokenizer = len(own_tokenizer(folder)) + (folder / TOKENIZER_CONFIG).stat().st_size
    return int(sum(4 * np.prod(t.shape) for t in plain) + tables + graph + tokenizer)


def _key_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode()) + 8
    if isinstance(value, list):
        return sum(_key_bytes(each) for each in value)
    return 4
