"""Targets follow bytes: hand-made cases, and random tokenizers against sums over all spellings."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from edgedistill.alignment import UNUSED, Aligned, align, tail
from edgedistill.checks.cleaning import answer_source, clean_answer
from edgedistill.recipe import CurateSpec
from edgedistill.spelling import STOP, Said, Source, spell

PLAIN = CurateSpec(strip_code_fence=False)
ONE_LINE = CurateSpec(collapse_whitespace=True)


class Toy:
    """A student's tokens by hand; ID 0 is its stop token."""

    stop_id = 0

    def __init__(self, *pieces: bytes) -> None:
        self.pieces: list[bytes | None] = [None, *pieces]

    def token_bytes(self, index: int) -> bytes | None:
        return self.pieces[index]

    def first(self, piece: bytes) -> int | None:
        """Exactly the piece, or the longest token that it begins with."""
        found = [i for i, p in enumerate(self.pieces) if p and piece.startswith(p)]
        return max(found, key=lambda i: len(self.pieces[i] or b"")) if found else None

    def ids(self, *pieces: bytes) -> list[int]:
        return [self.pieces.index(piece) for piece in pieces]


def said(piece: bytes | None, chance: float, **others: float) -> Said:
    """`others` by text, a space as _, the end as END."""
    spelled = {"END": STOP}
    listed = [
        (spelled.get(text, text.replace("_", " ").encode()), math.log(p))
        for text, p in others.items()
    ]
    return Said(piece, math.log(chance), tuple(listed))


def masses(aligned: Aligned, row: int) -> dict[int, float]:
    ids = [int(i) for i in aligned.ids[row] if i != UNUSED]
    return {i: round(math.exp(x), 5) for i, x in zip(ids, aligned.logprobs[row], strict=False)}


def aligned(
    toy: Toy,
    tokens: Sequence[bytes],
    steps: Sequence[Said],
    text: str | None = None,
    cleaning: CurateSpec = PLAIN,
    k: int = 8,
) -> Aligned:
    """Targets of an answer that the student writes with `tokens` and its stop token."""
    answer = b"".join(tokens)
    source = Source.same(answer.decode())
    if text is not None:
        assert clean_answer(text, cleaning).encode() == answer.removeprefix(b"_")
        source = answer_source(text, cleaning)
    return align([*toy.ids(*tokens), 0], answer, spell(steps, source), toy, k)


TOY = Toy(b"SEL", b"ECT", b"SELECT", b" a", b"b", b"c", b"bc", b" ", b"FROM", b" FROM", b"a", b"\n")
S = {piece: index for index, piece in enumerate(TOY.pieces) if piece}


def test_the_same_tokens_are_the_other_models_top_k() -> None:
    steps = [said(b"SELECT", 0.7, SEL=0.2, a=0.05), said(b" a", 0.5, b=0.3), said(STOP, 0.9, c=0.1)]
    found = aligned(TOY, [b"SELECT", b" a"], steps)
    assert masses(found, 0) == {S[b"SELECT"]: 0.7, S[b"SEL"]: 0.2, S[b"a"]: 0.05}
    assert masses(found, 1) == {S[b" a"]: 0.5, S[b"b"]: 0.3}
    assert masses(found, 2) == {0: 0.9, S[b"c"]: 0.1}
    assert found.known.all()
    assert tail(found.logprobs) == pytest.approx([0.05, 0.2, 0.0], abs=1e-6)
    assert (found.ids.dtype, found.logprobs.dtype, found.ids.shape) == (
        np.int32,
        np.float32,
        (3, 8),
    )
    assert np.isneginf(found.logprobs[found.ids == UNUSED]).all()


@pytest.mark.parametrize(
    ("tokens", "steps", "wanted"),
    [
        # longer than the other's: along what was chosen; what might have been said leads elsewhere
        (
            [b"SELECT"],
            [said(b"SEL", 0.8, b=0.1), said(b"ECT", 0.5, _a=0.25, ECTb=0.125)],
            [{b"SELECT": 0.5, b"SEL": 0.2, b"b": 0.1}],
        ),
        # shorter: given the bytes of the other's token that were already written
        (
            [b"SEL", b"ECT"],
            [said(b"SELECT", 0.6, SELc=0.2, b=0.1, SEL=0.1)],
            [{b"SEL": 0.9, b"b": 0.1}, {b"ECT": 0.66667, b"c": 0.22222}],
        ),
        # two pieces that lead to one token, one that the student cannot write, one that ends it
        (
            [b"b", b"c"],
            [said(b"b", 0.4, bX=0.2, bc=0.1, Q=0.1), said(b"c", 0.5, END=0.5)],
            [{b"b": 0.6, b"bc": 0.1}, {b"c": 0.5, b"": 0.5}],
        ),
        # the end in the middle of a longer token
        (
            [b"SELECT"],
            [said(b"SEL", 0.8), said(b"ECT", 0.5, END=0.5)],
            [{b"SELECT": 0.4, b"SEL": 0.4}],
        ),
    ],
)  # fmt: skip
def test_by_hand(tokens: list[bytes], steps: list[Said], wanted: list[dict[bytes, float]]) -> None:
    found = aligned(TOY, tokens, steps)
    for row, expected in enumerate(wanted):
        named = {S.get(piece, 0): chance for piece, chance in expected.items()}
        assert masses(found, row) == pytest.approx(named)
    assert not found.known[len(tokens)]  # the end was not told


FENCED = "Sure:\n```sql\nSELECT  a\n```\nDone."


@pytest.mark.parametrize(
    ("text", "cleaning", "tokens", "steps", "wanted"),
    [
        # only what the fence holds is learnt; what closes it is the end
        (
            FENCED,
            ONE_LINE,
            [b"SELECT", b" a"],
            [
                *(said(p, 0.5) for p in (b"Sure", b":\n", b"```", b"sql", b"\n")),
                *(said(b"SEL", 0.8, b=0.1), said(b"ECT", 1.0), said(b" ", 0.5, _a=0.25, b=0.125)),
                *(said(b" a", 0.5, FROM=0.5), said(b"\n", 0.5, _FROM=0.25, END=0.125)),
                *(said(b"```", 1.0), said(b"\nDone.", 1.0), said(STOP, 1.0)),
            ],
            [
                {b"SELECT": 0.8, b"b": 0.1},
                {b" a": 0.5, b"b": 0.125, b" FROM": 0.25},
                {b"": 0.625, b" FROM": 0.25},
            ],
        ),
        # white space that is joined or taken off counts as what it becomes
        (
            "  b\nc\n",
            ONE_LINE,
            [b"b", b" ", b"c"],
            [
                *(said(b" ", 0.5), said(b" b", 0.4, b=0.2, c=0.1, _=0.1, **{"```": 0.1})),
                *(said(b"\n", 0.5, _a=0.25), said(b"c\n", 0.5, c=0.25, b=0.125)),
            ],
            [{b"b": 0.6, b"c": 0.1}, {b" ": 0.5, b" a": 0.25}, {b"c": 0.75, b"b": 0.125}, {}],
        ),
        # without joining, a line break is a line break
        (
            "b\nc",
            PLAIN,
            [b"b", b"\n", b"c"],
            [said(b"b", 1.0), said(b"\n", 0.5, _a=0.25), said(b"c", 1.0), said(STOP, 0.9, b=0.1)],
            [{b"b": 1.0}, {b"\n": 0.5, b" a": 0.25}, {b"c": 1.0}, {b"": 0.9, b"b": 0.1}],
        ),
        # the server took off the first space; its end is spelled like text
        (
            "bc",
            PLAIN,
            [b"b", b"c"],
            [said(b" b", 0.5, **{"</s>": 0.25}), said(b"c", 0.5, **{"</s>": 0.25}),
             said(b"</s>", 0.5, c=0.25)],
            [{b"b": 0.5, b"": 0.25}, {b"c": 0.5, b"": 0.25}, {b"": 0.5, b"c": 0.25}],
        ),
        # a token whose bytes are not known: what it covers is not known, what follows is
        (
            "bcbc",
            PLAIN,
            [b"b", b"c", b"b", b"c"],
            [said(b"b", 0.5), said(None, 1.0), said(b"bc", 0.5, b=0.5)],
            [{b"b": 0.5}, {}, {b"b": 1.0}, {b"c": 0.5}],
        ),
        # found again in a wrong place
        (
            "bcbb",
            PLAIN,
            [b"b", b"c", b"b", b"b"],
            [said(None, 1.0), said(b"b", 0.5), said(b"c", 0.5)],
            [{}] * 4,
        ),
        # the tokens of another text, from somewhere on
        (
            "bcb",
            PLAIN,
            [b"b", b"c", b"b"],
            [said(b"b", 0.5), said(b"b", 0.5)],
            [{b"b": 0.5}, {}, {}],
        ),
    ],
)  # fmt: skip
def test_cleaned_answers(
    text: str,
    cleaning: CurateSpec,
    tokens: list[bytes],
    steps: list[Said],
    wanted: list[dict[bytes, float]],
) -> None:
    found = aligned(TOY, tokens, steps, text, cleaning)
    for row, expected in enumerate(wanted):
        named = {S.get(piece, 0): chance for piece, chance in expected.items()}
        assert masses(found, row) == pytest.approx(named, abs=1e-4), f"token {row}"
        assert found.known[row] == bool(expected)


def test_a_space_that_only_the_student_puts_in_front() -> None:
    toy = Toy(b" b", b" ", b"c", b" c")
    steps = spell([said(b"b", 0.5, c=0.25), said(b"c", 0.5)], Source.same("bc"))
    found = align(toy.ids(b" b", b"c"), b"bc", steps, toy, 4)
    assert masses(found, 0) == {1: 0.5, 4: 0.25}
    alone = align(toy.ids(b" ", b"c"), b"c", spell([said(b"c", 0.5)], Source.same("c")), toy, 4)
    assert [masses(alone, row) for row in (0, 1)] == [{2: 0.5}, {3: 0.5}]


def test_tokens_that_do_not_spell_the_answer_have_no_targets() -> None:
    steps = spell([said(b"b", 0.5)], Source.same("b"))
    assert not align(TOY.ids(b"c"), b"b", steps, TOY, 4).known.any()
    assert not align([], b"", [], TOY, 4).known.any()


def test_no_more_than_k_and_no_more_than_one() -> None:
    """Half precision can give log-probabilities that sum to more than 1."""
    found = aligned(TOY, [b"b"], [said(b"b", 0.7, c=0.4, a=0.1)], k=2)
    assert masses(found, 0) == pytest.approx({S[b"b"]: 0.7 / 1.2, S[b"c"]: 0.4 / 1.2}, abs=1e-5)
    assert tail(found.logprobs)[0] == pytest.approx(0.1 / 1.2, abs=1e-6)


ALPHABET = (b"a", b"\xc3", b"\xa9")


def prefix_free(chance: random.Random, size: int) -> list[bytes]:
    """Pieces of which none begins another, so that bytes can be spelled in one way only."""
    leaves = list(ALPHABET)
    while len(leaves) < size:
        grown = leaves.pop(chance.randrange(len(leaves)))
        leaves += [grown + byte for byte in ALPHABET]
    return leaves


class Other:
    """A model over `pieces` that looks one token back; its distribution can be summed in full."""

    def __init__(self, pieces: list[bytes], seed: int) -> None:
        self.pieces = pieces
        drawn = np.random.default_rng(seed).dirichlet([0.5] * len(pieces), len(pieces) + 1)
        self.table = drawn.tolist()

    def said(self, token: int, before: int) -> Said:
        listed = zip(self.pieces, self.table[before], strict=True)
        others = tuple((p, math.log(x)) for i, (p, x) in enumerate(listed) if i != token and x > 0)
        return Said(self.pieces[token], math.log(self.table[before][token]), others)

    def chance(self, text: bytes) -> float:
        """Probability that what it says begins with `text`: the sum over all it can say."""

        @cache
        def begins(rest: bytes, before: int) -> float:
            if not rest:
                return 1.0
            total = 0.0
            for token, piece in enumerate(self.pieces):
                if piece.startswith(rest):
                    total += self.table[before][token]
                elif rest.startswith(piece):
                    total += self.table[before][token] * begins(rest[len(piece) :], token)
            return total

        return begins(text, len(self.pieces))


@pytest.mark.parametrize("seed", range(40))
def test_probabilities_are_those_of_all_that_the_other_model_can_say(seed: int) -> None:
    chance = random.Random(seed)
    other = Other(prefix_free(chance, chance.choice([3, 5, 9, 15])), seed)
    toy = Toy(*prefix_free(chance, chance.choice([3, 5, 9, 15])))
    text, steps, before = b"", [], len(other.pieces)
    while len(text) < 12:
        token = chance.choices(range(len(other.pieces)), other.table[before])[0]
        steps.append(other.said(token, before))
        text, before = text + other.pieces[token], token
    source = Source.same("")
    source.raw, source.starts, source.stop = text, list(range(len(text))), len(text)
    tokens, at = [], 0
    while (token := toy.first(text[at:])) is not None:
        tokens.append(token)
        at += len(toy.pieces[token] or b"")
    found = align(tokens, text[:at], spell(steps, source), toy, len(toy.pieces))
    assert found.known.all()
    assert len(tokens) >= 3
    begin = 0
    for row, token in enumerate(tokens):
        before_it = other.chance(text[:begin])
        true = {
            i: other.chance(text[:begin] + piece) / before_it
            for i, piece in enumerate(toy.pieces)
            if piece
        }
        got = {
            int(i): math.exp(x) for i, x in zip(found.ids[row], found.logprobs[row], strict=True)
        }
        assert got[token] == pytest.approx(true[token], rel=1e-5)
        # A piece that only begins a student token leads nowhere yet, so others may be too low.
        assert all(got[i] <= true[i] * (1 + 1e-5) for i in got if i != UNUSED)
        if max(map(len, filter(None, toy.pieces))) == 1:
            assert {i: p for i, p in true.items() if p > 1e-9} == pytest.approx(
                {i: got.get(i, 0.0) for i, p in true.items() if p > 1e-9}, rel=1e-4
            )
        begin += len(toy.pieces[token] or b"")


@pytest.mark.parametrize("seed", range(40))
def test_random_spellings_of_random_text(seed: int) -> None:
    """Without alternatives a token's probability is the product over what it covers."""
    chance = random.Random(seed)
    text = "".join(chance.choice(["a", "b ", "é", "中", "🙂", "\n", "'"]) for _ in range(30))
    raw = text.encode()

    def cut() -> list[bytes]:
        marks = sorted({0, len(raw), *(chance.randrange(len(raw)) for _ in range(len(raw) // 2))})
        return [raw[a:b] for a, b in pairwise(marks)]

    mine, theirs = cut(), cut()
    logprobs = [-chance.random() for _ in theirs]
    steps = spell(list(map(Said, theirs, logprobs)), Source.same(text))
    toy = Toy(*dict.fromkeys(mine))
    found = align(toy.ids(*mine), raw, steps, toy, 3)
    starts = np.cumsum([0, *map(len, theirs)])
    begin = 0
    for row, piece in enumerate(mine):
        begun = [
            x for at, x in zip(starts, logprobs, strict=False) if begin <= at < begin + len(piece)
        ]
        assert found.ids[row].tolist() == [*toy.ids(piece), UNUSED, UNUSED]
        assert found.logprobs[row, 0] == pytest.approx(sum(begun), abs=1e-5)
        begin += len(piece)
