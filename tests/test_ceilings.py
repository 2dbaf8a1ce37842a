"""How much memory is read to measure it, and what is told of that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edgedistill import ceilings_child
from edgedistill.ceilings import CEILINGS, LEAST_MEGABYTES, asked_ceilings
from edgedistill.child import Child

MB = 1_000_000
ANSWERS = """
import json, sys
for line in sys.stdin:
    given = json.loads(line)
    print(json.dumps({"ok": {"bytes_per_second": given["megabytes"] * 1e9, "flops": 1e9}}))
    sys.stdout.flush()
"""


def started() -> Child:
    return Child(CEILINGS, Path("numpy"), command=[sys.executable, "-c", ANSWERS])


@pytest.mark.parametrize(
    ("memory", "threads", "megabytes"),
    [
        (0, 1, None),  # a device that does not tell it
        (8 * 4 * LEAST_MEGABYTES * MB - 1, 4, None),
        (8 * 4 * LEAST_MEGABYTES * MB, 4, LEAST_MEGABYTES),
        (64_000 * MB, 4, 256),
    ],
)
def test_a_cache_is_not_told_as_memory(memory: int, threads: int, megabytes: Any) -> None:
    found = asked_ceilings(started, threads, memory, "method")
    assert (None if found is None else found.bandwidth_gb_s) == megabytes


def test_what_is_counted_and_divided_by_the_seconds() -> None:
    """Exactly: a test that times this machine cannot tell a factor of two from other work."""
    found = ceilings_child.measure(threads=3, megabytes=2, passes=1, timed=lambda *_: 0.5)
    assert found == {"bytes_per_second": 3 * 2 * MB / 0.5, "flops": 3 * 2 * 1024**3 / 0.5}
