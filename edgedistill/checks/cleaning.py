"""What is cleaned off an answer before it is learnt or compared."""

from __future__ import annotations

import re

from edgedistill.recipe import CurateSpec
from edgedistill.spelling import Part, Source

_FENCE = re.compile(r"```(?:[\w+.-]*[ \t]*\r?\n)?(.*?)(?:```|\Z)", re.DOTALL)
# A line comment keeps the line break that ends it: joined, it would swallow what follows.
LITERAL = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
_KEPT_OR_SPACE = re.compile(rf"(?P<kept>{LITERAL}|--[^\n]*\n?|/\*.*?\*/)|\s+", re.DOTALL)


def clean_answer(text: str, spec: CurateSpec) -> str:
    """The answer without what surrounds it: white space, and, where the spec asks for it, a code
    fence (the first one counts) and line breaks (but none inside a SQL literal or comment)."""
    parts, _ = _parts(text, spec)
    return "".join(" " if part.joined else text[part.start : part.stop] for part in parts)


def answer_source(text: str, spec: CurateSpec) -> Source:
    """Where the bytes of `clean_answer(text, spec)` come from in `text`."""
    parts, fenced = _parts(text, spec)
    return Source(
        text,
        parts,
        joins=spec.collapse_whitespace,
        unfences=spec.strip_code_fence,
        fenced=fenced,
    )


def _parts(text: str, spec: CurateSpec) -> tuple[list[Part], bool]:
    """What is kept of a text, and whether a code fence held it."""
    start, stop = _stripped(text, 0, len(text))
    fence = _FENCE.search(text, start, stop) if spec.strip_code_fence else None
    if fence is not None:
        start, stop = _stripped(text, *fence.span(1))
    if start == stop or not spec.collapse_whitespace:
        return [Part(start, stop)] if start < stop else [], fence is not None
    parts, at = [], start
    for found in _KEPT_OR_SPACE.finditer(text, start, stop):
        literal = found["kept"] is not None
        parts += [Part(at, found.start())] if at < found.start() else []
        parts.append(Part(*found.span(), joined=not literal, literal=literal))
        at = found.end()
    return [*parts, *([Part(at, stop)] if at < stop else [])], fence is not None


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    """The same range of a text without white space at both ends."""
    whole = text[start:stop]
    left = len(whole) - len(whole.lstrip())
    return start + left, start + left + len(whole.strip())
