from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import tiny

from edgedistill.allocations import AllocationSpec
from edgedistill.artifacts import Checkpoint, Sensitivity, write_json
from edgedistill.bench.roofline import estimate, load_from
from edgedistill.errors import ConfigError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.fit.allocation import _offered, allocate, budget_bytes, other_onnx_bytes, solve
from edgedistill.footprint import memory_bytes, shape_of_layout
from edgedistill.number_formats import stored_bytes
from edgedistill.onnx_builder import build_onnx
from edgedistill.progress import Silent
from edgedistill.runtime import quantize_file
from edgedistill.runtimes import size_of
from edgedistill.target import Roofline, Target
from edgedistill.tensors import matrices, read_layout

TYPES = ("Q4_0", "Q5_0", "Q8_0")


def spec(**given: object) -> AllocationSpec:
    return AllocationSpec(**{"name": "mine", "types": TYPES, "budget_mb": 1.0, **given})


def target(*specs: AllocationSpec) -> Target:
    return Target(
        name="small",
        description="a small device",
        device_class="board",
        runtime="llama.cpp",
        formats=("Q8_0",),
        allocations=specs,
        latency="measured",
        memory_budget_mb=100,
        roofline=Roofline(bandwidth_gb_s=1, efficiency=0.5, compute_gflops=10),
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_least_loss_that_fits_is_found(seed: int) -> None:
    chance = random.Random(seed)
    sizes = {f"t{i}": {k: chance.randint(1, 30) for k in TYPES} for i in range(6)}
    costs = {name: {k: chance.random() for k in TYPES} for name in sizes}
    budget = 60
    every = [dict(zip(sizes, kinds, strict=True)) for kinds in itertools.product(TYPES, repeat=6)]
    fitting = [e for e in every if sum(sizes[n][k] for n, k in e.items()) <= budget]
    best = min(sum(costs[n][k] for n, k in e.items()) for e in fitting)
    found = solve(sizes, costs, budget)
    assert sum(sizes[n][k] for n, k in found.items()) <= budget
    assert sum(costs[n][k] for n, k in found.items()) == pytest.approx(best)


def test_greedy_would_do_worse() -> None:
    """By loss saved a byte, greedy takes the first upgrade and has no room for the second."""
    sizes = {"a": {"Q4_0": 0, "Q8_0": 6}, "b": {"Q4_0": 0, "Q8_0": 10}}
    costs = {"a": {"Q4_0": 7.0, "Q8_0": 0.0}, "b": {"Q4_0": 10.0, "Q8_0": 0.0}}
    assert solve(sizes, costs, 10) == {"a": "Q4_0", "b": "Q8_0"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny.tiny_student(tmp_path_factory.mktemp("student")).folder, "tiny")


def onnx_target(*specs: AllocationSpec) -> Target:
    given = {**target().model_dump(), "runtime": "onnxruntime-genai", "formats": ["int8-b32"]}
    return Target.model_validate({**given, "allocations": specs})


def sensitivity(
    checkpoint: Checkpoint, folder: Path, types: tuple[str, ...] = TYPES
) -> Sensitivity:
    shapes = matrices(read_layout(checkpoint.folder))
    costs = {
        name: {kind: i + 1 / stored_bytes(1, 256, kind) for kind in types}
        for i, name in enumerate(shapes)
    }
    write_json(folder / "sensitivity.json", costs)
    write_json(folder / "asked.json", [[[5, 6, 7], [8, 9]]])
    return Sensitivity(folder, "costs", folder / "sensitivity.json", folder / "asked.json")


def test_the_file_is_as_large_as_planned(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wanted = spec(budget_mb=1.2)
    costs = sensitivity(checkpoint, tmp_path)
    made = allocate(checkpoint, costs, None, wanted, target(wanted), tmp_path, Silent())
    f16, file = tmp_path / "f16.gguf", tmp_path / "made.gguf"
    origin = Provenance("recipe", "example/Tiny", "MIT", "tiny")
    tokenizer = checkpoint.folder / "tokenizer.gguf.json"
    write_gguf(checkpoint.folder, tokenizer, f16, origin, Silent())
    quantize_file(f16, file, "Q8_0", types=made.types)
    assert 1.15e6 < file.stat().st_size <= 1.2e6
    assert len(set(made.types.values())) > 1


def test_a_budget_below_the_smallest_file_names_that(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wanted = spec(budget_mb=0.5)
    costs = sensitivity(checkpoint, tmp_path)
    with pytest.raises(
        ConfigError, match=r"allocations.mine.budget_mb: 0.5 is below .* 0.7 MB; .*set vocabulary"
    ):
        allocate(checkpoint, costs, None, wanted, target(wanted), tmp_path, Silent())


def test_one_type_is_for_every_matrix_but_the_embedding(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wanted = AllocationSpec(name="plain", types=("Q4_0",), embedding="Q6_K")
    made = allocate(checkpoint, None, None, wanted, target(wanted), tmp_path, Silent())
    assert made.types.pop("token_embd.weight") == "Q6_K"
    assert set(made.types.values()) == {"Q4_0"}


def test_a_rate_is_a_budget_by_the_roofline(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wanted = spec(budget_mb=None, budget_tokens_per_second=300)
    costs, device = sensitivity(checkpoint, tmp_path), target(wanted)
    made = allocate(checkpoint, costs, None, wanted, device, tmp_path, Silent())
    layout, assumed = read_layout(checkpoint.folder), device.roofline
    assert assumed is not None
    sizes = {
        name: (stored_bytes(rows, columns, made.types[name]), rows * columns)
        for name, (_, rows, columns) in matrices(layout).items()
    }
    keys = {"block_count": tiny.LAYERS, "embedding_length": tiny.HIDDEN}
    keys |= {"attention.head_count": tiny.HEADS, "attention.head_count_kv": tiny.KV_HEADS}
    half = device.context_tokens / 2
    rate = estimate(load_from(sizes, keys), assumed, half, 0, {}).tokens_per_second
    assert 300 < rate < 330


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime-genai"])
def test_memory_is_a_budget_by_the_runtimes_formula(checkpoint: Checkpoint, runtime: str) -> None:
    layout = read_layout(checkpoint.folder)
    types = TYPES if runtime == "llama.cpp" else ("int4-b32", "int8-b32")
    wanted = spec(types=types, budget_mb=None, budget_memory_mb=20.0)
    device = target(wanted) if runtime == "llama.cpp" else onnx_target(wanted)
    budget = budget_bytes(wanted, device, layout, checkpoint.folder)
    assert budget is not None
    needed = [memory_bytes(budget + more, shape_of_layout(layout), device) for more in (0, 2)]
    assert needed[0] <= 20e6 < needed[1]


def test_bits_are_counted_over_the_whole_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wanted = spec(budget_mb=None, budget_bits_per_weight=6.0)
    layout = read_layout(checkpoint.folder)
    budget = budget_bytes(wanted, target(wanted), layout, checkpoint.folder)
    assert budget == int(0.75 * read_layout(checkpoint.folder).parameters)


def test_an_onnx_model_folder_is_as_large_as_planned(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wanted = spec(types=("int4-b32", "int8-b32"), budget_mb=1.3)
    costs = sensitivity(checkpoint, tmp_path, wanted.types)
    made = allocate(checkpoint, costs, None, wanted, onnx_target(wanted), tmp_path, Silent())
    for layer in range(tiny.LAYERS):
        fused = {made.types[f"blk.{layer}.attn_{part}.weight"] for part in "qkv"}
        assert len(fused) == 1
    assert set(made.types.values()) == set(wanted.types)
    build_onnx(checkpoint.folder, tmp_path / "made", "int4-b32", types=made.types)
    size = size_of(tmp_path / "made")
    assert 1.15e6 < size <= 1.3e6
    planned = json.loads((made.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert size <= planned["planned_bytes"] < 1.02 * size


def test_white_space_in_a_tokenizer_file_is_not_planned_for(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout = read_layout(checkpoint.folder)
    spaced = tmp_path / "spaced"
    shutil.copytree(checkpoint.folder, spaced)
    tokenizer = json.loads((spaced / "tokenizer.json").read_text("utf-8"))
    (spaced / "tokenizer.json").write_text(json.dumps(tokenizer, indent=8), "utf-8")
    assert other_onnx_bytes(spaced, layout) == other_onnx_bytes(checkpoint.folder, layout)


def test_a_fallback_without_a_fast_kernel_is_not_offered() -> None:
    wanted = spec(types=("Q4_K", "Q8_0"))
    assert _offered("blk.0.attn_q.weight", 576, wanted, []) == ["Q5_0", "Q8_0"]
    assert _offered("blk.0.attn_q.weight", 576, wanted, ["Q4_K", "Q8_0"]) == ["Q8_0"]
    assert _offered("blk.0.attn_q.weight", 256, wanted, ["Q4_K", "Q8_0"]) == ["Q4_K", "Q8_0"]
    only = spec(types=("Q4_K",), budget_mb=None)
    assert _offered("blk.0.attn_q.weight", 576, only, ["Q4_K"]) == ["Q5_0"]


@pytest.mark.parametrize(
    ("kernels", "types", "wanted"),
    [
        (["Q4_0", "Q8_0"], None, ("Q4_0", "Q8_0")),
        (["Q4_0", "Q8_0"], ["Q4_0", "Q8_0"], ("Q4_0", "Q8_0")),
        (["Q4_0", "Q8_0"], ["Q4_0", "Q2_K"], None),
        ([], None, None),
    ],
)
def test_types_are_those_with_fast_kernels(
    kernels: list[str], types: list[str] | None, wanted: tuple[str, ...] | None
) -> None:
    mine = {"name": "mine", "budget_mb": 1.0} | ({} if types is None else {"types": types})
    given = {**target().model_dump(), "kernels": kernels, "allocations": [mine]}
    if wanted is not None:
        assert Target.model_validate(given).allocations[0].types == wanted
        return
    with pytest.raises(ValueError, match=r"no fast kernels for Q2_K|types"):
        Target.model_validate(given)


def test_types_are_those_of_the_runtime() -> None:
    with pytest.raises(ValueError, match="onnxruntime-genai has no Q4_0"):
        onnx_target(spec())
    with pytest.raises(ValueError, match=r"llama.cpp has no int4-b32"):
        target(spec(types=("int4-b32", "int8-b32")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"types": ("Q4_0", "Q9_9")}, "unknown types Q9_9"),
        ({"types": ("Q4_0",)}, "so it takes no budget"),
        ({"budget_mb": None}, "3 types need a budget to choose by"),
        ({"budget_tokens_per_second": 5.0}, "there are two budgets, budget_mb and budget_tok"),
        ({"name": "a b"}, "name"),
        ({"types": ("Q4_0", "int4-b32")}, "ONNX types go with ONNX types of the same block alone"),
        ({"types": ("int4-b32", "int8-b64")}, "ONNX types go with ONNX types of the same block"),
        ({"types": ("int4-b32-asym", "int4-b32")}, "unknown types int4-b32-asym"),
    ],
)
def test_what_is_no_allocation(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**given)
