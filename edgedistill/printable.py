"""Texts of models and of files that others made, as a terminal may be given them."""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL, and C1: a terminal takes them for orders (ECMA-48).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Each control character replaced by U+FFFD, so that what is left of a sequence is seen."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
