"""What bounds a model on a device: how fast its memory is read, and how fast it multiplies.

Williams, Waterman, Patterson 2009 (the roofline model): both are measured, not taken from a data
sheet. The other side is ceilings_child.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from edgedistill.child import Child, Program

CEILINGS = Program(
    runtime="numpy", module="edgedistill.ceilings_child", packages={"numpy": "numpy"}, extra="dev"
)
MEGABYTES, PASSES = 256, 7  # a thread: larger than the caches that threads share
MEMORY_SHARE = 8  # all arrays together take at most this part of what is free
METHOD = (
    "float32: a dot product over an array a thread, larger than the caches, and products of "
    "matrices of 1024 x 1024, one a thread (numpy's BLAS); the best of 7 passes"
)


@dataclass(frozen=True)
class Ceilings:
    """With `threads`: `bandwidth_gb_s` (1e9 bytes a second read) and `compute_gflops` (1e9
    multiplications and additions a second). Quantized kernels multiply integers, and may exceed
    the latter."""

    bandwidth_gb_s: float
    compute_gflops: float
    threads: int
    method: str


def measure_ceilings(threads: int) -> Ceilings:
    """This machine's, in some seconds.

    Raises:
        RuntimeFailure: the child died, as where there is too little memory.
    """
    child = Child(CEILINGS, Path("numpy"))
    return asked_ceilings(child, threads, psutil.virtual_memory().available, METHOD)


def asked_ceilings(child: Child, threads: int, free_bytes: int, method: str) -> Ceilings:
    """What a child that knows `measure` finds; it is closed behind that.

    Raises:
        RuntimeFailure: it does not know that, or died.
    """
    room = free_bytes // MEMORY_SHARE // threads // 1_000_000
    size = max(1, min(MEGABYTES, room))
    try:
        found = child.ask("measure", threads=threads, megabytes=size, passes=PASSES)
    finally:
        child.close()
    return Ceilings(found["bytes_per_second"] / 1e9, found["flops"] / 1e9, threads, method)
