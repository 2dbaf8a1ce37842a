"""What a candidate may cost: size, memory at run time (footprint.py), and what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import GateFailed
from edgedistill.results import Candidate, told_apart
from edgedistill.target import Target

CANDIDATES = "candidates.json"


@dataclass(frozen=True)
class Broken:
    """A bound that a candidate breaks; `factor` is how far, as measured over bound."""

    text: str
    factor: float


def broken_bounds(candidate: Candidate, target: Target) -> list[Broken]:
    """The target's bounds that the candidate is outside of."""
    gates = target.gates
    drop = round(candidate.agreement_before - candidate.agreement, 9)
    bounds: list[tuple[str, float, float | None, str]] = [
        ("file", candidate.bytes / 1e6, gates.max_file_mb, " MB"),
        ("memory", candidate.estimated_memory_bytes / 1e6, target.memory_budget_mb, " MB"),
        ("agreement drop", drop, gates.max_agreement_drop, ""),
    ]
    if candidate.fitted:  # the teacher's answers taught it too, so it may be apart for the better
        rise = (candidate.nll or 0.0) - (candidate.nll_before or 0.0)
        bounds.append(("NLL rise", rise, gates.max_nll_rise, ""))
    else:
        bounds.append(("mean KLD", candidate.mean_kld, gates.max_mean_kld, ""))
        bounds.append(("p99 KLD", candidate.p99_kld, gates.max_p99_kld, ""))
    return [
        Broken(
            "{} {}{unit} > {}{unit}".format(name, *told_apart(value, bound), unit=unit),
            _factor(value, bound),
        )
        for name, value, bound, unit in bounds
        if bound is not None and not value <= bound
    ]


def _factor(value: float, bound: float) -> float:
    return value / bound if bound else 1 + value


def _furthest(candidate: Candidate, target: Target) -> float:
    """1 for one that is inside all of them, which held-out prompts refused."""
    return max((broken.factor for broken in broken_bounds(candidate, target)), default=1.0)


def none_passes(table: Sequence[Candidate], target: Target, folder: Path) -> GateFailed:
    lines = [f"\n    {c.format}: {c.why_not}" for c in table]
    closest = min(table, key=lambda c: _furthest(c, target))
    return GateFailed(
        "quantize",
        f"no format is inside the bounds of target {target.name}:" + "".join(lines),
        where=str(folder),
        hint=f"closest is {closest.format}; loosen its bound, or add formats to the target "
        f"(all figures: {CANDIDATES} there)",
    )
