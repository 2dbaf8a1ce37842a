"""What bounds a model on a device: how fast its memory is read, and how fast it multiplies.

Williams, Waterman, Patterson 2009 (the roofline model): both are measured, not taken from a data
sheet. The other side is ceilings_child.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgedistill.child import Child, Program

CEILINGS = Program(
    runtime="numpy", module="edgedistill.ceilings_child", packages={"numpy": "numpy"}, extra="dev"
)
MEGABYTES, PASSES = 256, 7  # a thread: larger than the caches that threads share
LEAST_MEGABYTES = 32  # below, a cache may be what is read
MEMORY_SHARE = 8  # all arrays together take at most this part of the memory
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


def measure_ceilings(threads: int) -> Ceilings | None:
    """This machine's, in some seconds; None where too little memory is free.

    Raises:
        RuntimeFailure: the child died, as where there is too little memory.
    """
    memory = psutil.virtual_memory().available
    return asked_ceilings(lambda: Child(CEILINGS, Path("numpy")), threads, memory, METHOD)


def asked_ceilings(
    start: Callable[[], Child], threads: int, memory_bytes: int, method: str
) -> Ceilings | None:
    """What a child that knows `measure` finds; `start` starts it, and it is closed at the end.
    `memory_bytes`: of which the arrays take a share, 0 where it is not known. None where that is
    less than LEAST_MEGABYTES a thread: a cache is no memory.

    Raises:
        RuntimeFailure: it does not know that, or died.
    """
    room = memory_bytes // MEMORY_SHARE // threads // 1_000_000
    size = min(MEGABYTES, room)
    if size < LEAST_MEGABYTES:
        return None
    child = start()
    try:
        found = child.ask("measure", threads=threads, megabytes=size, passes=PASSES)
    finally:
        child.close()
    return Ceilings(found["bytes_per_second"] / 1e9, found["flops"] / 1e9, threads, method)
