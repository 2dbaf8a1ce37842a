"""Memory of this process: its peak with its children, sampled while a stage works, and what the
allocator does with what training frees."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Iterator
from types import TracebackType

import psutil

# The teacher is a black box that usually runs elsewhere; when it runs here, its server carries
# this word on its command line and is counted apart. A student may be served the same way.
SERVER_MODULE = "edgedistill.teacher.local_server"
TEACHER = "teacher"
INTERVAL_SECONDS = 0.1
# Finding children reads the whole process table, and takes that time from whoever computes.
CHILDREN_EVERY = 5  # intervals

# Options of glibc's <malloc.h>: their values while freed memory is kept, and afterwards, which are
# where glibc's own adapting thresholds end in a program that frees blocks of many megabytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEPING = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
USUAL = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20), (M_MMAP_MAX, 65536))


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, memory that is freed is used again instead of going back to the system.

    A training step makes and frees gradients and logits of many megabytes. glibc maps each of them
    anew, and the system clears every page of it again. Other C libraries are left as they are.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    for option, value in KEEPING:
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in USUAL:
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def give_back() -> None:
    """Free memory goes back to the system, once. Blocks of many sizes leave holes that no other
    block fits into, and kept ones would add up."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    # mallopt alone is no sign of glibc: Android's has other options.
    return libc if hasattr(libc, "gnu_get_libc_version") else None


class PeakMemory:
    """Context manager: `own_bytes` for this process with its children, `server_bytes` for local
    teacher servers, both the largest resident sum seen (sampled every 0.1 s, children 0.5 s)."""

    def __init__(self) -> None:
        self.own_bytes = 0
        self.server_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me, beside, server = psutil.Process(), 0, 0
        for turn in itertools.count():
            if turn % CHILDREN_EVERY == 0:
                beside, server = children(me)
            self.own_bytes = max(self.own_bytes, me.memory_info().rss + beside)
            self.server_bytes = max(self.server_bytes, server)
            if self._stop.wait(INTERVAL_SECONDS):
                return


def resident(me: psutil.Process) -> int:
    """Resident bytes now of `me` with its children, local teacher servers left out."""
    return int(me.memory_info().rss) + children(me)[0]


def children(me: psutil.Process) -> tuple[int, int]:
    """Resident bytes now of the children of `me`: without local teacher servers, and of those."""
    own = server = 0
    for child in me.children(recursive=True):
        try:
            size = child.memory_info().rss
            if child.cmdline()[-1:] == [TEACHER]:
                server += size
            else:
                own += size
        except psutil.Error:
            continue  # it ended between the two calls
    return own, server
