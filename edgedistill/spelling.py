"""How another model spelled an answer: its tokens, placed on the bytes of what is learnt.

What is learnt may be a cleaned part of what was said (`checks.clean_answer`): a token of the other
model may lie outside it, begin before it, or say white space that was joined to one space. Places
are byte offsets, never numbers of tokens: tokenizers differ.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STOP = b""  # the piece that ends an answer
FENCE = b"```"
SPACE_RUN = re.compile(rb"\s+")
LONGEST_LOST = 32  # bytes that a token whose bytes are not known may have


@dataclass(frozen=True)
class Said:
    """A token the other model chose and what else it might have: bytes and log-probability (nats).
    Bytes are None where they are not known, and STOP for what ends the answer."""

    piece: bytes | None
    logprob: float
    others: tuple[tuple[bytes | None, float], ...] = ()


@dataclass(frozen=True)
class Part:
    """Characters [start, stop) of a text that cleaning kept: as they are, or `joined` to one space.
    Inside a `literal` no space is joined."""

    start: int
    stop: int
    joined: bool = False
    literal: bool = False


@dataclass(frozen=True)
class Step:
    """A token of the other model that spells the bytes [start, stop) of the answer, or `stops` it,
    with probability `chance`; `others`: what else it might have said from `start` on, cleaned as
    the answer was, with probabilities. Probabilities are given all of the answer before `start`."""

    start: int
    stop: int
    chance: float
    others: tuple[tuple[bytes, float], ...]
    logprob: float
    stops: bool = False


class Source:
    """Where the bytes of an answer come from in the text another model said.

    `starts`: for each byte of the answer the byte of `raw` where it begins; its last one ends at
    `stop`. `strips`: white space around the answer was taken off; `joins`: white space inside it
    was joined to single spaces; `unfences`: a code fence would have been taken off, and `fenced`:
    one was, and what closes it is in `raw`.
    """

    def __init__(
        self, text: str, parts: Sequence[Part], *, joins: bool, unfences: bool, fenced: bool
    ) -> None:
        self.raw = text.encode("utf-8")
        self.joins, self.strips, self.unfences = joins, True, unfences
        at, offsets = 0, [0]
        for character in text:
            at += len(character.encode("utf-8"))
            offsets.append(at)
        self._runs = [(offsets[p.start], offsets[p.stop]) for p in parts if p.joined]
        self._literals = [(offsets[p.start], offsets[p.stop]) for p in parts if p.literal]
        self.starts: list[int] = []
        for part in parts:
            whole = range(offsets[part.start], offsets[part.stop])
            self.starts += whole[:1] if part.joined else whole
        self.stop = offsets[parts[-1].stop] if parts else 0
        self.fenced = fenced and self.raw[self.stop :].lstrip().startswith(FENCE)

    @classmethod
    def same(cls, answer: str) -> Source:
        """The other model was given the answer itself to read."""
        source = cls(answer, [Part(0, len(answer))], joins=False, unfences=False, fenced=False)
        source.strips = False
        return source

    def in_run(self, at: int) -> bool:
        """Whether white space before this byte of `raw` has become the answer's space already."""
        return _inside(self._runs, at)

    def joins_at(self, at: int) -> bool:
        return self.joins and not _inside(self._literals, at)


def _inside(ranges: Sequence[tuple[int, int]], at: int) -> bool:
    index = bisect_left(ranges, (at, 0)) - 1
    return index >= 0 and ranges[index][0] < at < ranges[index][1]


def spell(said: Sequence[Said], source: Source) -> list[Step]:
    """The steps in which the other model spelled the answer. Where its tokens are not those of the
    text, or their bytes are not known, steps are missing; each follows the one before it wherever
    its `start` is that one's `stop`. What it said behind the answer tells how likely its end is.
    """
    if not source.starts:
        return []
    placed = _placed(said, source.raw)
    end = _end_piece(said, placed, source.raw)
    steps = []
    for begin, token in placed:
        if source.starts[0] < begin + len(token.piece or b"") and begin < source.stop:
            steps.append(_step(begin, token, source, end))
    return [*steps, *_behind(placed, source, end)]


def _placed(said: Sequence[Said], raw: bytes) -> list[tuple[int, Said]]:
    """Tokens with the byte of `raw` at which they begin: below 0 for white space that the server
    took off, from its length on for what it did not send as text."""
    placed: list[tuple[int, Said]] = []
    at, lost = -_lead(said, raw), 0
    sure: int | None = None  # placed before a token was lost: what follows it must fit to the end
    for token in said:
        piece = token.piece
        if piece is None:
            lost += 1
            continue
        if lost and at < len(raw):
            sure = len(placed) if sure is None else sure
            at = raw.find(piece, at + 1, at + LONGEST_LOST * lost + len(piece))
            if at < 0 or not piece:
                return placed[:sure]
        lost = 0
        if at < len(raw) and raw[max(at, 0) : at + len(piece)] != piece[max(-at, 0) :]:
            return placed[:sure]
        placed.append((at, token))
        at += len(piece)
    return placed


def _lead(said: Sequence[Said], raw: bytes) -> int:
    """Bytes of white space at the beginning of the tokens that the text has not."""
    first = bytearray()
    for token in said:
        if token.piece is None or first.strip():
            break
        first += token.piece
    spaces = len(first) - len(first.lstrip())
    return max(0, spaces - (len(raw) - len(raw.lstrip())))


def _end_piece(
    said: Sequence[Said], placed: Sequence[tuple[int, Said]], raw: bytes
) -> bytes | None:
    """How the other model's end is spelled: by its last token, where the text has not got it."""
    if not placed or placed[-1][1] is not said[-1] or placed[-1][0] < len(raw):
        return None
    piece = said[-1].piece
    return piece if piece == STOP or (piece or b"").strip() else None


def _step(begin: int, token: Said, source: Source, end: bytes | None) -> Step:
    piece = token.piece or b""
    first = source.starts[0]
    # What the token says before the answer is given, but for white space that is taken off anyway.
    given = piece[: max(0, first - begin)]
    given = given.rstrip() if source.strips else given
    trim = source.strips and begin + len(piece) > source.stop
    others = []
    likely = math.exp(token.logprob)
    total = likely
    for other, logprob in token.others:
        if other is None or not other.startswith(given):
            continue
        chance = math.exp(logprob)
        total += chance
        if other in (end, STOP):
            others += [(STOP, chance)] if not given else []
        elif rest := _cleaned(other[len(given) :], begin, source, trim):
            others.append((rest, chance))
    scale = 1 / total if given and total > 0 else 1.0
    return Step(
        start=bisect_left(source.starts, max(begin, first)),
        stop=bisect_left(source.starts, begin + len(piece)),
        chance=likely * scale,
        others=tuple((rest, chance * scale) for rest, chance in others),
        logprob=token.logprob,
    )


def _cleaned(piece: bytes, begin: int, source: Source, trim: bool) -> bytes:
    """What would be left of a piece at byte `begin` of the text, by the rules the answer followed;
    b"" for white space and a fence, which say nothing alone."""
    first = source.strips and begin <= source.starts[0]
    if first and source.unfences and piece.lstrip().startswith(FENCE[:2]):
        return b""
    if source.joins_at(begin):
        piece = SPACE_RUN.sub(b" ", piece)
    if first or source.in_run(begin):
        piece = piece.lstrip()
    return piece.rstrip() if trim else piece


def _behind(
    placed: Sequence[tuple[int, Said]], source: Source, end: bytes | None
) -> Iterator[Step]:
    """Steps from the answer's last byte to its end: white space that is taken off, then the end
    itself or the fence that closes it. None of them where the end was not told."""
    at, steps = len(source.starts), []
    for begin, token in placed:
        piece = token.piece or b""
        if begin < source.stop:
            if piece[source.stop - begin :].strip():
                return  # the last token of the answer closes the fence too
            continue
        closes = source.fenced and piece.lstrip()[:1] == FENCE[:1]
        stops = closes or (begin >= len(source.raw) and piece == end)
        if piece.strip() and not stops:
            return
        others = tuple(_options_behind(token, source, end))
        steps.append(Step(at, at, math.exp(token.logprob), others, token.logprob, stops))
        if stops:
            yield from steps
            return


def _options_behind(
    token: Said, source: Source, end: bytes | None
) -> Iterator[tuple[bytes, float]]:
    for other, logprob in token.others:
        if other is None:
            continue
        if other in (end, STOP) or (source.fenced and other.lstrip()[:1] == FENCE[:1]):
            yield STOP, math.exp(logprob)
        elif other.strip():
            rest = SPACE_RUN.sub(b" ", other) if source.joins else other
            yield rest, math.exp(logprob)
