"""Model FLOPs: the arithmetic that training asks for, whatever is computed twice on the way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from edgedistill.training.need import Dimensions

# Dense bf16 peak without sparsity, in FLOP/s, by a part of the name that CUDA tells (NVIDIA's data
# sheets). PCIe and laptop parts of a name may reach less.
PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)


def model_flops(found: Dimensions, batches: Sequence[Sequence[Any]], whole: bool) -> float:
    """Of a forward and a backward pass over all batches (Kaplan et al. 2020, arXiv 2001.08361).

    2 for each weight and token forward, as much for the gradient of its input, and, where the
    weight is trained (`whole`), for its own; the head on supervised tokens alone; attention is
    causal, so half of its square.
    """
    passes = 3 if whole else 2
    total = 0.0
    for batch in batches:
        for row in batch:
            length = len(row)
            total += 2 * found.matrices * length * passes
            total += 2 * found.width * found.vocabulary * row.supervised * passes
            total += 2 * found.layers * found.queries * length * length * 3
    return total


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None: not known here."""
    return next((peak for part, peak in PEAKS if re.search(rf"\b{part}\b", name)), None)
