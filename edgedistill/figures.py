"""The figures of a result by name: their unit, which way is better, and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PERCENTILES = ("p50", "p95", "p99")
TIMED = {
    "time_to_first_token": "first token",
    "inter_token": "inter-token",
    "inter_chunk": "inter-chunk",
    "time_per_output_token": "per token",
    "end_to_end": "end to end",
}


@dataclass(frozen=True)
class Figure:
    """`of_device`: it was measured on a device and holds there alone, and other work on the machine
    disturbs it; else it is of the model, wherever that runs."""

    label: str
    unit: str  # "tokens/s" | "s" | "J" | "bytes" | "share", a share being 0..1
    more_is_better: bool
    of_device: bool


FIGURES: Mapping[str, Figure] = {
    "tg128": Figure("decode", "tokens/s", more_is_better=True, of_device=True),
    "pp512": Figure("prefill", "tokens/s", more_is_better=True, of_device=True),
    "tokens_per_second": Figure("all answers", "tokens/s", more_is_better=True, of_device=True),
    **{
        f"{name}_{percentile}": Figure(f"{label} {percentile}", "s", False, of_device=True)
        for name, label in TIMED.items()
        for percentile in PERCENTILES
    },
    "cold_start": Figure("cold start", "s", more_is_better=False, of_device=True),
    "load": Figure("load", "s", more_is_better=False, of_device=True),
    "peak_memory": Figure("peak memory", "bytes", more_is_better=False, of_device=True),
    "energy_per_answer": Figure("energy an answer", "J", more_is_better=False, of_device=True),
    "bytes": Figure("size", "bytes", more_is_better=False, of_device=False),
    "agreement": Figure("agreement", "share", more_is_better=True, of_device=False),
    "gold": Figure("gold", "share", more_is_better=True, of_device=False),
    "refusals": Figure("refusals", "share", more_is_better=False, of_device=False),
    "regressions": Figure("refused, yet answered", "share", more_is_better=False, of_device=False),
    "drift": Figure("drift", "share", more_is_better=False, of_device=False),
}
SHARES = ("agreement", "gold", "refusals", "regressions", "drift")
FAULTS = ("refusals", "regressions", "drift")  # shares that are 0 where nothing is wrong
COLUMNS = (
    "tg128", "pp512", "time_to_first_token_p50", "inter_token_p95", "end_to_end_p50", "cold_start",
    "peak_memory", "energy_per_answer", "bytes", "agreement", "gold", "refusals",
    "regressions", "drift",
)  # fmt: skip
