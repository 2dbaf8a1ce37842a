"""What an answer asserts that can be told without a model."""

from __future__ import annotations

import time

import pytest

from edgedistill.assertions import assertions, unsupported


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("It takes 5 gigabytes.", "number", "number 5 gb"),
        ("It costs $1,200.50.", "number", "number 1200.5 $"),
        ("Due on May 3, 2026.", "date", "date 2026-05-03"),
        ("Due on the 3rd of May 2026.", "date", "date 2026-05-03"),
        ("Due on 2026-05-03.", "date", "date 2026-05-03"),
        ("See https://example.com/a.html.", "address", "address https://example.com/a.html"),
        ("Write to help@example.com.", "address", "address help@example.com"),
        ("It calls get_user first.", "code", "code get_user"),
        ("It says \u201cnot now\u201d to all.", "quote", "quote not now"),
        ("Ask for Anna Schmidt there.", "name", "name anna schmidt"),
    ],
)
def test_each_kind_by_its_value(text: str, kind: str, value: str) -> None:
    assert [(each.kind, each.value) for each in assertions(text)] == [(kind, value)]


@pytest.mark.parametrize("text", ["1. Open it.\n2) Close it.", "This begins large.", "e.g. so", ""])
def test_what_asserts_nothing(text: str) -> None:
    assert assertions(text) == []


@pytest.mark.parametrize(
    ("answer", "known", "new"),
    [
        ("It takes 5 GB.", ["It takes 5 gigabytes."], []),
        ("It takes 5 MB.", ["It takes 5 gigabytes."], ["5 MB"]),
        ("It takes 5.", ["It takes 5 GB."], []),
        ("It takes 5 GB.", ["How many GB? 5"], []),
        ("It takes 5 days.", ["It takes 15 days."], ["5 days"]),
        ("Due on 3 May 2026.", ["Due on 2026-05-03."], []),
        ("Due on 4 May 2026.", ["Due on 2026-05-03."], ["4 May 2026"]),
        ("We ship to Paris and Rome.", ["Do you ship to paris?"], ["Rome"]),
        ("Call get_user or drop_user.", ["Use get_user."], ["drop_user"]),
        ('He said "go away".', ["He said: Go away!"], []),
        ("Order 4815162999.", ["Order 4815162342."], ["4815162999"]),
        ("Call 0301234999.", ["Call 0301234567."], ["0301234999"]),
        ("It costs $1,250,000.75.", ["It costs $1,250,000.25."], ["$1,250,000.75"]),
        ("It costs 1,234,567.50.", ["It costs 1234567.5."], []),
        ("Use 7.", ["Use 007."], ["7"]),
        ("Below -0.0 or +5.", ["Below 0 or 5."], []),
    ],
)
def test_what_neither_prompt_nor_teacher_says(
    answer: str, known: list[str], new: list[str]
) -> None:
    assert [each.text for each in unsupported(answer, known)] == new


@pytest.mark.parametrize(
    "unbroken",
    [
        "a",
        "a.",
        "1",
        "111,",
        "a@",
        "a-",
        "_",
        "`a",
        "'a ",
        "-1",
        "f().",
        "Ab ",
        "5 ms ",
        "a_b ",
        " ",
    ],
)
def test_a_long_text_takes_no_more_than_its_share(unbroken: str) -> None:
    """Ten times the text, and no more than about ten times the time: the square would be 100."""

    def seconds(length: int) -> float:
        text, started = (unbroken * length)[:length] + "x", time.process_time()
        assertions(text)
        return time.process_time() - started

    short = min(seconds(20_000) for _ in range(3))
    assert seconds(200_000) < 40 * short + 0.2
