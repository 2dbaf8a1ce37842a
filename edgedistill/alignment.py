"""What another model's token probabilities say about the tokens of the student: both read the same
bytes, and only bytes are compared.

At a student token that begins at byte b, the other model's token that covers b is taken, and what
it might have said instead, as far as it agrees with the answer up to b. Each of these leads to the
token that the student would write first. Where the student's token is longer than the other
model's, its probability is the product along what was chosen, and what might have been said on the
way leads elsewhere. With both models' tokens alike, this is the other model's top k with its IDs
exchanged. Exact but for: what is below the other model's top k; other ways in which the other model
could spell the bytes before b; and an alternative that is itself only the beginning of a longer
student token, which counts for the token that it spells alone.

What is not listed is the tail, one bucket: naive top-k targets, renormalised or cut, teach a biased
distribution (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870). A loss on these
targets keeps its NLL term on the answer itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgedistill.spelling import STOP, Step

UNUSED = -1  # an ID where fewer than k are known
Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
Known = npt.NDArray[np.bool_]


class Tokens(Protocol):
    """What is needed of a `vocabulary.Vocabulary`."""

    stop_id: int

    def token_bytes(self, index: int) -> bytes | None: ...

    def first(self, piece: bytes) -> int | None: ...


@dataclass(frozen=True, eq=False)
class Aligned:
    """Targets of n answer tokens: `ids` int32 [n, k], UNUSED behind the last; `logprobs` float32
    [n, k], nats, highest first, -inf where unused; `known` bool [n], false where nothing is."""

    ids: Ids
    logprobs: Logprobs
    known: Known

    @classmethod
    def unknown(cls, count: int, k: int) -> Aligned:
        """Targets of `count` tokens of which nothing is known."""
        return cls(
            np.full((count, k), UNUSED, np.int32),
            np.full((count, k), -np.inf, np.float32),
            np.zeros(count, np.bool_),
        )


def tail(logprobs: Logprobs) -> npt.NDArray[np.float32]:
    """Probability [n] of everything that is not listed in `logprobs` [n, k]."""
    listed = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
    return np.asarray(np.clip(1 - listed, 0, 1), np.float32)


def align(
    tokens: Sequence[int], answer: bytes, steps: Sequence[Step], vocabulary: Tokens, k: int
) -> Aligned:
    """Targets over the student's token IDs for each of `tokens`, its encoding of `answer` with or
    without the stop token behind it; `steps` tell how another model spelled `answer`
    (`spelling.spell`). Nothing is known where `tokens` do not spell the answer (but for a first
    space, which SentencePiece puts in front) and where steps are missing."""
    made = Aligned.unknown(len(tokens), k)
    spelled = [vocabulary.token_bytes(token) for token in tokens]
    ends = bool(tokens) and tokens[-1] == vocabulary.stop_id
    written = spelled[:-1] if ends else spelled
    text = b"".join(piece or b"" for piece in written)
    lead = len(text) - len(answer)
    if None in written or text != b" " * lead + answer or lead not in (0, 1):
        return made
    begin, at = -lead, 0
    for row, token in enumerate(tokens):
        stops = row == len(written)
        end = begin + (0 if stops else len(spelled[row] or b""))
        while at < len(steps) and steps[at].stop <= begin and steps[at].start < begin:
            at += 1
        reader = _Reader(answer, steps, at, vocabulary)
        _put(made, row, reader.read(token, begin, None if stops else end))
        begin = end
    return made


@dataclass
class _Reader:
    """Follows the other model's steps from number `at` on through one student token."""

    answer: bytes
    steps: Sequence[Step]
    at: int
    vocabulary: Tokens

    def read(self, token: int, begin: int, end: int | None) -> dict[int, float]:
        """Probability of each student token that may come at byte `begin`, where `token` does, up
        to byte `end`, or None for the stop token. Empty: steps are missing."""
        place, weight = max(begin, 0), 1.0
        spelled = b" " * (place - begin)  # the space that SentencePiece puts in front
        masses: dict[int, float] = {}
        expected = self.steps[self.at].start if self.at < len(self.steps) else place + 1
        given = self.answer[expected:place]
        if expected > place:
            return {}
        for step in itertools.islice(self.steps, self.at, None):
            agreeing = [(o, p) for o, p in step.others if o.startswith(given)]
            total = step.chance + sum(p for _, p in agreeing) if given else 1.0
            if step.start != expected or total <= 0:
                return {}
            for other, chance in agreeing:
                led = self._led(spelled, other, len(given))
                if led is not None:
                    masses[led] = masses.get(led, 0.0) + weight * chance / total
            weight *= step.chance / total
            spelled += self.answer[place : step.stop]
            place, expected, given = max(place, step.stop), step.stop, b""
            if step.stops if end is None else place >= end:
                masses[token] = masses.get(token, 0.0) + weight
                return masses
        return {}

    def _led(self, spelled: bytes, other: bytes, given: int) -> int | None:
        """The student token that comes of saying `other` behind `spelled`."""
        if other == STOP:
            return self.vocabulary.first(spelled) if spelled else self.vocabulary.stop_id
        return self.vocabulary.first(spelled + other[given:]) if len(other) > given else None


def _put(made: Aligned, row: int, masses: dict[int, float]) -> None:
    """The k highest as the targets of one token. Log-probabilities that were rounded or made in
    half precision can sum to more than 1, which they must not."""
    total = max(1.0, sum(masses.values()))
    highest = sorted(((p, -token) for token, p in masses.items() if p > 0), reverse=True)
    for column, (chance, token) in enumerate(highest[: made.ids.shape[1]]):
        made.ids[row, column] = -token
        made.logprobs[row, column] = math.log(chance / total)
    made.known[row] = bool(highest)
