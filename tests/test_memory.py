"""What the allocator does with freed memory while a student is trained."""

from __future__ import annotations

import platform

import psutil
import pytest

from edgedistill.memory import freed_memory_kept, give_back

BLOCK = 256 << 20


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_stays_until_the_end() -> None:
    before = resident()
    with freed_memory_kept():
        block = b"x" * BLOCK
        del block
        assert resident() - before > BLOCK * 0.9
    assert resident() - before < BLOCK * 0.1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_goes_back_when_it_is_asked_to() -> None:
    before = resident()
    with freed_memory_kept():
        block = b"x" * BLOCK
        del block
        give_back()
        assert resident() - before < BLOCK * 0.1


def failing_work() -> None:
    block = b"x" * BLOCK
    del block
    raise KeyError


def test_an_error_ends_it_too() -> None:
    before = resident()
    with pytest.raises(KeyError), freed_memory_kept():
        failing_work()
    assert resident() - before < BLOCK * 0.1


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(name: None) -> None:
        raise TypeError("Windows: a name is needed")

    monkeypatch.setattr("edgedistill.memory.ctypes.CDLL", none_here)
    with freed_memory_kept():
        give_back()
