"""Says which edgedistill was measured: benchmarks/run.py lays two of them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgedistill


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Into the JSON that pytest-benchmark writes."""
    assert edgedistill.__file__ is not None
    machine_info["edgedistill"] = str(Path(edgedistill.__file__).resolve().parent)
