"""What every check of an export looks at: conversations, rows, and where two values part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgedistill.fidelity import EvalRow

KLD_ROWS = 12
SHORT = 60
# Rendered through the chat template: what a user may type, in one turn and in several.
TURNS = (
    "Hello!",
    "Hi. What can I do?",
    "  Count to 10:\n\t1, 2, 3 — näïve 中文 🙂 it's <b>2024</b>",
    "4",
)


def chosen_rows(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """KLD_ROWS rows, evenly from the first to the last."""
    return list(rows[:: max(1, len(rows) // KLD_ROWS)][:KLD_ROWS])


def conversations() -> Iterator[tuple[str, list[dict[str, str]], bool]]:
    """Conversations of one and of several turns: label, messages, whether an answer is asked."""
    for turns in range(1, len(TURNS) + 1):
        talk = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(TURNS[:turns])
        ]
        yield f"a conversation of {turns} turns", talk, turns % 2 == 1


def difference(wanted: Any, found: Any) -> str:
    """Where two values part, in words."""
    if isinstance(wanted, list | str) and isinstance(found, list | str):
        at = next(
            (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
            min(len(wanted), len(found)),
        )
        if isinstance(wanted, list) or len(wanted) + len(found) > SHORT:
            here = f"position {at} of {len(wanted)}"
            return f"at {here}: {_shown(found, at)} instead of {_shown(wanted, at)}"
    return f"{found!r} instead of {wanted!r}"


def _shown(value: Sequence[Any], at: int) -> str:
    if at >= len(value):
        return "nothing"
    return repr(value[at] if isinstance(value, list) else value[at : at + SHORT])
