"""Which answers are refusals: one rule for the teacher's, when they are curated, and for those that
are measured.
"""

from __future__ import annotations

from collections.abc import Sequence

# What a server itself says of an answer that is none (finish_reason).
REFUSED_BY_API = ("refusal", "content_filter")


def refusal_start(answer: str, starts: Sequence[str]) -> str | None:
    """The one of `starts` that an answer starts with, in any case and with any apostrophe; None
    where it is no refusal."""
    plain = _plain(answer)
    return next((start for start in starts if plain.startswith(_plain(start))), None)


def refuses(answer: str, starts: Sequence[str], finish_reason: str = "") -> bool:
    """Whether an answer is a refusal, by its text or by what the server says of it."""
    if finish_reason in REFUSED_BY_API:
        return True
    return refusal_start(answer.strip(), starts) is not None


def _plain(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()
