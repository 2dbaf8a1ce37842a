"""Log-probabilities of an answer's tokens: as a teacher sends them, as a trace keeps them, as what
learns from them reads them.

Sent: `choices[0].logprobs.content` of the chat-completions API (OpenAI API reference), a list of
`{"token", "bytes", "logprob", "top_logprobs": [{"token", "bytes", "logprob"}, ...]}`.
Kept: one `[piece, logprob, [[piece, logprob], ...]]` a token, the alternatives without the token
itself. A piece is text where its bytes are UTF-8, else a list of byte values, or null where the
teacher did not say which bytes; "" ends the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.spelling import Said

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
DECIMALS = 6
ROUNDING = 1e-3  # what a server that computes in half precision may be above 0, in nats
LEAST = -9999.0  # OpenAI's own for what is too unlikely to tell
Piece = str | list[int] | None


class Unreadable(Exception):
    """What was sent are no log-probabilities."""


def compact(sent: object) -> list[Any] | None:
    """What a trace keeps of a choice's `logprobs`; None where it has none.

    Raises:
        Unreadable: a token without a log-probability, or one that is none.
    """
    content = sent.get("content") if isinstance(sent, Mapping) else None
    if not isinstance(content, list):
        return None
    spells = any(isinstance(e, Mapping) and isinstance(e.get("bytes"), list) for e in content)
    return [_token(entry, spells) for entry in content]


def _token(entry: object, spells: bool) -> list[Any]:
    if not isinstance(entry, Mapping):
        raise Unreadable
    piece, logprob = _piece(entry, spells), _logprob(entry)
    listed = entry.get("top_logprobs")
    if not isinstance(listed, list | None):
        raise Unreadable
    others, itself = [], piece is not None
    for other in listed or ():
        if not isinstance(other, Mapping):
            raise Unreadable
        spelled, chance = _piece(other, spells), _logprob(other)
        if itself and spelled == piece:
            itself = False  # two tokens can spell the same: only one of them is the token
        else:
            others.append([spelled, chance])
    return [piece, logprob, others]


def _logprob(entry: Mapping[str, Any]) -> float:
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable
    if math.isnan(value) or value > ROUNDING:
        raise Unreadable
    return round(min(0.0, max(LEAST, float(value))), DECIMALS)


def _piece(entry: Mapping[str, Any], spells: bool) -> Piece:
    """`spells`: the teacher gives bytes, so that a token without them is a special one."""
    token, spelled = entry.get("token"), entry.get("bytes")
    if not isinstance(token, str):
        raise Unreadable
    if not isinstance(spelled, list) or not all(_is_byte(value) for value in spelled):
        return None if spells else _unless_replaced(token)
    try:
        # Some servers make `bytes` from the text, where what is no whole character is already lost.
        return _unless_replaced(bytes(spelled).decode("utf-8"))
    except UnicodeDecodeError:
        return spelled


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 256


def _unless_replaced(text: str) -> str | None:
    """None for a text that stands for bytes which are not known."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return None if REPLACEMENT in text else text


def read_said(kept: Sequence[Any]) -> list[Said]:
    """The tokens of a trace's `top_logprobs`.

    Raises:
        ValueError, TypeError: they are not as `compact` makes them.
    """
    return [
        Said(_bytes(piece), float(logprob), tuple((_bytes(p), float(x)) for p, x in others))
        for piece, logprob, others in kept
    ]


def _bytes(piece: Piece) -> bytes | None:
    if piece is None:
        return None
    return piece.encode("utf-8") if isinstance(piece, str) else bytes(piece)
