"""Make the next item while the present one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, each made in a thread while the one before it is used.

    Pays where both sides leave the interpreter's lock, as NumPy's conversions and file writes do.
    At most two items exist at a time. What making one raises is raised where it would be used.
    """
    made = iter(items)
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, made, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, made, _END)
            yield item  # type: ignore[misc]  # next's default is the sentinel alone
