"""Results as sittings give them, made by the noise model of edgedistill.measures: each process has
a pace of its own, around which its values lie; and answers of which some change from file to file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.bench.agreement import bootstrap
from edgedistill.measures import Measure, measure
from edgedistill.result_file import Result, write_result

PROCESS_NOISE, RUN_NOISE = 0.008, 0.004  # standard deviations, as shares of the value
PROMPTS = 400
CHECK: dict[str, Any] = {"kind": "exact", "strip": True}


def sample_result(
    seed: int = 0,
    *,
    decode: float = 40.0,
    right: Sequence[bool] | None = None,
    name: str = "student",
    size: int = 105_000_000,
    fingerprint: str = "aaaa1111",
    processes: int = 3,
    noise: float = PROCESS_NOISE,
    busy: bool = False,
    digest: str = "mix-1",
) -> Result:
    """`decode` tokens/s; `right` says for each prompt whether the answer is the teacher's."""
    draw = random.Random(seed)
    answered = first_answers() if right is None else list(right)
    rows = [
        {"id": f"p{i}", "answer": str(flag), "same": flag, "gold": flag}
        for i, flag in enumerate(answered)
    ]
    share = vars(bootstrap(answered, 500, 0))
    return Result(
        made=f"2026-03-{seed % 28 + 1:02d}T10:00:00+00:00",
        edgedistill="0.1.0",
        model={"name": name, "file": f"{name}.gguf", "sha256": f"sha-{name}-{size}", "bytes": size},
        device={"address": "local", "cpu": f"cpu {fingerprint[:4]}", "fingerprint": fingerprint,
                "runtime": {"name": "llama.cpp", "llama-cpp-python": "0.3.36"}},
        load={"before": 0.4 if busy else 0.01, "during": 0.01, "busy": busy},
        conditions={"before": {"power": "mains"}, "after": {}, "joules": None, "throttled": False},
        settings={"processes": processes, "runs": 3, "threads": 2, "seed": 0, "max_tokens": 64,
                  "system": None},
        figures=_figures(draw, decode, processes, noise),
        token_mix={"source": "held-out prompts", "digest": digest, "prompts": len(rows)},
        check=CHECK,
        likeness={"rows": rows, "agreement": share, "gold": share, "threw": {}, "unlike": 0},
    )  # fmt: skip


def first_answers(count: int = PROMPTS, share: float = 0.9) -> list[bool]:
    """The first `share` of the prompts right."""
    return [place < share * count for place in range(count)]


def changed(before: Sequence[bool], lost: int, gained: int, seed: int = 0) -> list[bool]:
    """So many right answers become wrong, and wrong ones right."""
    draw, flags = random.Random(seed), list(before)
    for value, count in ((True, lost), (False, gained)):
        for place in draw.sample([i for i, flag in enumerate(before) if flag is value], count):
            flags[place] = not value
    return flags


def without_prompts(result: Result) -> Result:
    """As of a sitting that was given none."""
    alone = {name: result.figures[name] for name in ("tg128", "pp512", "load", "peak_memory")}
    return replace(result, figures=alone, token_mix=None, check=None, likeness=None)


def write(result: Result, file: Path) -> Path:
    """Into a file; returns it."""
    write_result(result, file)
    return file


def _figures(
    draw: random.Random, decode: float, processes: int, noise: float
) -> dict[str, Measure]:
    def groups(value: float, count: int) -> list[list[float]]:
        paces = [value * draw.gauss(1, noise) for _ in range(processes)]
        return [[pace * draw.gauss(1, RUN_NOISE) for _ in range(count)] for pace in paces]

    seconds = 1 / decode
    figures = {
        "tg128": measure(groups(decode, 3), "tokens/s"),
        "pp512": measure(groups(10 * decode, 3), "tokens/s"),
        "load": measure(groups(0.3, 1), "s"),
        "cold_start": measure(groups(0.5, 1), "s"),
        "peak_memory": measure([[180e6 + 4096 * number] for number in range(processes)], "bytes"),
    }
    timed = {"end_to_end": 20 * seconds, "time_to_first_token": 0.05, "inter_token": seconds}
    for name, value in timed.items():
        held = groups(value, 40)
        for statistic in ("p50", "p95", "p99"):
            figures[f"{name}_{statistic}"] = measure(held, "s", statistic)
    return figures
