"""Items made while others are used."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edgedistill.ahead import ahead


def test_order_is_kept() -> None:
    assert list(ahead(range(50))) == list(range(50))
    assert list(ahead(())) == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    second = threading.Event()

    def made() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    items = ahead(made())
    assert next(items) == 1
    assert second.wait(10)  # set although nobody has asked for the second item
    assert list(items) == [2]


def test_at_most_two_items_exist() -> None:
    made: list[int] = []

    for used in ahead(made.append(number) or number for number in range(10)):  # type: ignore[func-returns-value]
        assert len(made) <= used + 2


def test_an_error_comes_where_its_item_would_be_used() -> None:
    def made() -> Iterator[int]:
        yield 1
        raise ValueError("the second one")

    items = ahead(made())
    assert next(items) == 1
    with pytest.raises(ValueError, match="the second one"):
        next(items)
