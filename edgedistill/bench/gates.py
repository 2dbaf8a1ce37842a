"""Every bound of recipe and target with the figure it was held against."""

from __future__ import annotations

from collections.abc import Sequence

from edgedistill.bench.chain import measured_by
from edgedistill.recipe import RecipeGates
from edgedistill.results import Candidate, Gate, Link, LlamaBench, told_apart
from edgedistill.target import Target

STEPS = (
    "distill",
    "merge",
    "export",
    "trim",
    "fit",
    "quantize",
    "aarch64",
    "browser",
    "bench",
)  # the order in which they are named
OF_THE_FILE = {"fit", "quantize", "aarch64", "browser"}  # where another candidate may do better
MB = 1e6


def at_least(step: str, name: str, bound: float, measured: float) -> Gate:
    return Gate(step, name, bound, measured, measured >= bound)


def at_most(step: str, name: str, bound: float, measured: float) -> Gate:
    return Gate(step, name, bound, measured, measured <= bound)


def without_clock(
    recipe: RecipeGates,
    target: Target,
    merged_agreement: float,
    links: Sequence[Link],
    candidates: Sequence[Candidate],
    model_bytes: int,
    drop_in_all: float | None = None,
) -> list[Gate]:
    """The gates that do not depend on timing. Sizes and memory in MB (1e6 bytes). `drop_in_all` is
    the agreement lost from the exported model to what ships, where more than quantization lies in
    between."""
    gates = []
    if recipe.merged_agreement is not None:
        gates.append(
            at_least("distill", "merged_agreement", recipe.merged_agreement, merged_agreement)
        )
    gates += [
        at_most(link.step, name, bound, measured_by(link)[name])
        for link in links
        for name, bound in link.gates.items()
    ]
    if drop_in_all is not None:
        bound = target.gates.max_agreement_drop
        gates.append(at_most("quantize", "agreement_drop_in_all", bound, drop_in_all))
    if target.gates.max_file_mb is not None:
        gates.append(at_most("quantize", "file_mb", target.gates.max_file_mb, model_bytes / MB))
    gates += [
        at_most("quantize", "memory_mb", target.memory_budget_mb, c.estimated_memory_bytes / MB)
        for c in candidates
        if c.chosen
    ]
    return gates


def with_clock(target: Target, llama_bench: Sequence[LlamaBench]) -> list[Gate]:
    """The gates on speed; none where nothing was timed."""
    bound = target.gates.min_tokens_per_second
    if bound is None:
        return []
    return [
        at_least("bench", "tokens_per_second", bound, run.mean)
        for run in llama_bench
        if run.test == "tg128"
    ]


def failure(gates: Sequence[Gate]) -> tuple[str, str] | None:
    """The first step that failed and a text with every failed figure, or None."""
    failed = sorted((g for g in gates if not g.passed), key=lambda g: STEPS.index(g.step))
    return (failed[0].step, _figures(failed)) if failed else None


def _figures(failed: Sequence[Gate]) -> str:
    return "; ".join(
        "{}: {} is {}, the bound is {}".format(
            gate.step, gate.name, *told_apart(gate.measured, gate.bound)
        )
        for gate in failed
    )


def refused_by(gates: Sequence[Gate]) -> str:
    """The figures that refuse this one file, or "": nothing is broken, or something that every
    file of this student would break. A bound on speed counts as such: a larger file is slower."""
    failed = [gate for gate in gates if not gate.passed]
    if any(gate.step not in OF_THE_FILE for gate in failed):
        return ""
    return _figures(failed)
