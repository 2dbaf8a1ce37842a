"""How fast memory and arithmetic are here, in a process of its own, started by ceilings.py: a BLAS
takes its number of threads when it is loaded, and here each of our threads is to have one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from edgedistill.answering import answer_requests

ONE_THREAD = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
)  # fmt: skip
Timed = Callable[[Callable[[int], None], int, int], float]  # work by thread, threads, passes
SIDE = 1024  # of the matrices whose product is timed: three of them are 12 MB


def measure(
    threads: int, megabytes: int, passes: int, timed: Timed | None = None
) -> dict[str, Any]:
    """The best of `passes`, as `timed` has their seconds: bytes a second of all threads that each
    read an array of so many megabytes (float32, a dot product with itself), and floating-point
    operations a second of all threads that each multiply two float32 matrices."""
    import numpy as np

    chance = np.random.default_rng(0)
    arrays = [np.ones(megabytes * 250_000, np.float32) for _ in range(threads)]
    matrices = [chance.random((SIDE, SIDE), np.float32) for _ in range(threads)]
    product = [np.empty((SIDE, SIDE), np.float32) for _ in range(threads)]

    def read(thread: int) -> None:
        np.dot(arrays[thread], arrays[thread])

    def multiply(thread: int) -> None:
        np.matmul(matrices[thread], matrices[thread], out=product[thread])

    read_bytes, timed = sum(array.nbytes for array in arrays), timed or _best
    return {
        "bytes_per_second": read_bytes / timed(read, threads, passes),
        "flops": threads * 2 * SIDE**3 / timed(multiply, threads, passes),
    }


def _best(work: Callable[[int], None], threads: int, passes: int) -> float:
    """Seconds of the fastest pass, from the moment when all threads begin to the end of the last
    one. The first pass warms up."""
    seconds = []
    for _ in range(passes + 1):
        ready = threading.Barrier(threads + 1)

        def run(thread: int, ready: threading.Barrier = ready) -> None:
            ready.wait()
            work(thread)

        every = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        for each in every:
            each.start()
        ready.wait()
        started = time.perf_counter()
        for each in every:
            each.join()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    answer_requests(lambda do, given: measure(**given))


if __name__ == "__main__":
    main()
