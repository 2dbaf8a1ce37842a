"""What a terminal may be given."""

from __future__ import annotations

import pytest

from edgedistill.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\ufffd]0;owned\ufffd"),
        ("\x1b[2J", "\ufffd[2J"),
        ("\x9b2J\x7f\x00\r", "\ufffd2J\ufffd\ufffd\ufffd"),
        ("a\tb\nc é \u4f60", "a\tb\nc é \u4f60"),
    ],
)
def test_controls_are_seen_and_do_nothing(text: str, shown: str) -> None:
    assert printable(text) == shown
