from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgedistill.adapt import Adapted, require_gates
from edgedistill.errors import GateFailed
from edgedistill.fidelity import Kld
from edgedistill.recipe import RecipeGates
from edgedistill.results import Interval

ADAPTER = Path("adapter.gguf")
GATES = RecipeGates(merged_agreement=0.8, adapter_mean_kld=0.005)


def agreement(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1, 50)


GOOD = Adapted(50, agreement(0.8), agreement(0.8), Kld(0.005, 0.1, 1.0, 0.99, 400))


def test_as_good_as_each_bound_is_good_enough() -> None:
    require_gates(GATES, GOOD, ADAPTER)
    require_gates(RecipeGates(), replace(GOOD, agreement_before=agreement(0.0)), ADAPTER)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (replace(GOOD, agreement=agreement(0.78)), "0.780 on held-out prompts, below 0.8"),
        (replace(GOOD, agreement_before=agreement(0.82)), "0.800 .* and 0.820 without"),
        (replace(GOOD, kld=replace(GOOD.kld, mean_kld=0.0051)), "KLD is 0.0051 .* above 0.005"),
    ],
)
def test_what_is_worse_is_refused(changed: Adapted, said: str) -> None:
    with pytest.raises(GateFailed, match=said):
        require_gates(GATES, changed, ADAPTER)
