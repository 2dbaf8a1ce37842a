"""Reading the token mix: every broken line is named, and content alone shapes the digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgedistill.artifacts import TokenMixEntry
from edgedistill.errors import TokenMixError
from edgedistill.tokenmix import normalised, phrasing, read_token_mix

GOOD = '{"id": "a", "prompt": "How many?"}'


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines))
    return path


def test_reads_all_fields(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rich = {"id": "b", "messages": messages, "weight": 2, "tags": ["t"], "reference": "r"}
    mix = read_token_mix(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), "", json.dumps(rich), ""))
    first, second = mix.entries
    assert (first.prompt, first.weight, first.tags, first.reference) == ("How many?", 1.0, (), None)
    assert second == TokenMixEntry("b", tuple(messages), 2.0, ("t",), "r")
    assert second.prompt == "u"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not a JSON object"),
        ("[]", "must be a JSON object, not list"),
        (b'{"id": "\xff", "prompt": "x"}', "not UTF-8"),
        (r'{"id": "x", "prompt": "\ud800"}', "surrogate"),
        ('{"id": "x", "id": "y", "prompt": "p"}', "given twice"),
        ('{"prompt": "x"}', "id: is required"),
        ('{"id": 7, "prompt": "x"}', "id: must be"),
        ('{"id": "a", "prompt": "other"}', "already used in line 1"),
        ('{"id": "x"}', "either prompt or messages"),
        ('{"id": "x", "prompt": "p", "messages": []}', "either prompt or messages"),
        ('{"id": "x", "prompt": "  "}', "prompt: must be"),
        ('{"id": "x", "messages": []}', "messages: must be"),
        ('{"id": "x", "messages": [{"role": "robot", "content": "c"}]}', "messages[0]: must be"),
        ('{"id": "x", "messages": [{"role": "assistant", "content": "c"}]}', "last message"),
        ('{"id": "x", "prompt": "p", "promt": "p"}', "promt: unknown key"),
        ('{"id": "x", "prompt": "p", "weight": 0}', "weight: must be"),
        ('{"id": "x", "prompt": "p", "weight": NaN}', "weight: must be"),
        ('{"id": "x", "prompt": "p", "weight": true}', "weight: must be"),
        ('{"id": "x", "prompt": "p", "tags": "t"}', "tags: must be"),
        ('{"id": "x", "prompt": "p", "reference": 3}', "reference: must be"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | bytes, part: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(TokenMixError) as caught:
        read_token_mix(path)
    assert f"{path}:2: " in str(caught.value)
    assert part in str(caught.value)


def test_all_broken_lines_at_once_but_not_endlessly(tmp_path: Path) -> None:
    with pytest.raises(TokenMixError) as caught:
        read_token_mix(write(tmp_path, *["{}"] * 15))
    assert "30 problems" in str(caught.value)
    assert "prompts.jsonl:10: prompt" in str(caught.value)
    assert "and 10 more" in str(caught.value)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_empty(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(TokenMixError, match="no prompt"):
        read_token_mix(write(tmp_path, *lines))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenMixError, match=r"gone\.jsonl"):
        read_token_mix(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ('{"prompt":"How many?","id":"a","weight":1.0}\r', True),
        ('{"id": "a", "messages": [{"content": "How many?", "role": "user"}]}', True),
        ('{"id": "a", "prompt": "How many"}', False),
        ('{"id": "a", "prompt": "How many?", "tags": ["t"]}', False),
    ],
)
def test_digest_is_over_content(tmp_path: Path, line: str, same: bool) -> None:
    one = read_token_mix(write(tmp_path, GOOD)).digest
    assert (read_token_mix(write(tmp_path, line)).digest == one) == same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  How MANY,\ttickets?! ", "how many tickets"),
        ("don\u2019t", "dont"),
        ("Stra\u00dfe", "strasse"),
        ("a < b", "a < b"),
        ("?!", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("prompt", "tags", "expected"),
    [
        ("Any 12 of 7?", ("x", "phrasing:p1"), "p1"),
        ("Any 12 of 7?", ("x",), "any # of #"),
    ],
)
def test_phrasing(prompt: str, tags: tuple[str, ...], expected: str) -> None:
    entry = TokenMixEntry("a", ({"role": "user", "content": prompt},), tags=tags)
    assert phrasing(entry) == expected
