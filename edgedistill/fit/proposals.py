"""The choice of formats that loses least when it is really made.

Costs add up only roughly, so the solver's choice is a proposal: each format that it uses is left
out in turn, and of the proposals the one with the lowest measured KLD is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgedistill.progress import Progress

ROUNDS = 2
Sizes = Mapping[str, Mapping[str, int]]
Types = dict[str, str]


def search(
    folder: Path,
    asked: Any,
    importance: Any,
    sizes: Sizes,
    solve: Callable[[Sizes], Types | None],
    progress: Progress,
    onnx: bool = False,
) -> tuple[Types, float]:
    """The types and their measured mean KLD. `solve` proposes among the sizes it is given, None
    where they do not fit."""
    from edgedistill.fit.trial import Trial, means

    trial = Trial(folder, asked, means(importance), onnx)
    proposed = solve(sizes)
    assert proposed is not None
    best, least = proposed, trial.kld(proposed)
    for _ in range(ROUNDS):
        offers = []
        kinds = sorted(set(best.values()))
        with progress.task("try allocations", len(kinds), "choices") as task:
            for kind in kinds:
                without = _without(sizes, kind)
                types = None if without is None else solve(without)
                if without is not None and types is not None:
                    offers.append((trial.kld(types), without, types))
                task.advance(shown=f"KLD {min([least, *(o[0] for o in offers)]):.5f}")
        found = min(offers, key=lambda offer: offer[0], default=None)
        if found is None or found[0] >= least:
            break
        least, sizes, best = found
    return best, least


def _without(sizes: Sizes, kind: str) -> Sizes | None:
    """The offers without one type; a matrix that has no other keeps it."""
    left = {
        name: {k: size for k, size in by_type.items() if k != kind} or dict(by_type)
        for name, by_type in sizes.items()
    }
    return None if left == dict(sizes) else left
