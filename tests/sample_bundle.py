"""A bundle's manifest and report as `pack` writes them, of a build that nobody made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sample_report import sample_report
from sample_results import CHECK

from edgedistill.results import BenchResult

DATASET = "d" * 64


def write_bundle(
    folder: Path, report: BenchResult | None = None, dataset: str = DATASET, **changes: Any
) -> Path:
    """Returns the folder; `changes` are of the manifest."""
    made = sample_report() if report is None else report
    held_out = made.agreements[-1].overall.n
    made = replace(made, counts={**made.counts, "held_out": held_out})
    folder.mkdir(parents=True)
    bench = {
        "inputs": {"dataset": dataset},
        "tools": {"llama-cpp-python": "0.3.36"},
        "spec": {
            "check": CHECK,
            "prompt": {"system": None, "max_tokens": 64},
            "target": {"name": made.target, "runtime": "llama.cpp"},
        },
    }
    manifest = {
        "stage": "pack",
        "key": f"key-{made.target}",
        "spec": {"recipe": {"name": made.recipe}, "target": {"name": made.target}},
        "tools": {"edgedistill": "0.1.0"},
        "outputs": {made.model_file: {"sha256": f"sha-{made.target}", "bytes": made.model_bytes}},
        "facts": {"model": made.model_file, "format": made.format},
        "started": "2026-03-01T10:00:00Z",
        "provenance": {"bench": bench},
        **changes,
    }
    for name, value in (("manifest", manifest), ("report", made.to_json())):
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder
