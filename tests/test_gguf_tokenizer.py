"""Token IDs of the tokenizers that are built from GGUF keys are llama.cpp's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_families import family_student, sentencepiece_keys

from edgedistill.errors import WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.gguf_tokenizer import NAME, build_tokenizer, score_merges, tokenizer_config
from edgedistill.progress import Silent
from edgedistill.runtime import LlamaCpp
from edgedistill.student import TOKENIZER_GGUF, Key, write_tokenizer

POOL = "thearndgionxyabs 12\n\t.,é日本zQ😀\u00a0▁"
WHOLE = (
    "",
    " ",
    "   leading, trailing   ",
    "the and  an    anding abababab babab",
    "<|user|> the<|end|>\n\n\nand</s><s>[mark]the",
    "<|user|>\n \t the <|end|> \n<|end",
    "<0x41> <0xE6>",
    "日本語 🇩🇪 e\u0301 \x00\x7f",
    "\n\n\n\n\n",
    "'s I'LL 12345 don't  Camel CASE éÉ x/y\r\n",
)
PIECES = (
    "<|user|>",
    "<|end|>",
    "<|im_end|>",
    "[mark]",
    " the",
    "  ",
    "\n\n",
    "abab",
    "'ll",
    "1234",
)


def texts() -> Iterator[str]:
    chance = random.Random(0)
    yield from WHOLE
    for _ in range(300):
        length = chance.randrange(1, 30)
        yield "".join(
            chance.choice(PIECES if chance.random() < 0.2 else POOL) for _ in range(length)
        )


def different(
    folder: Path, keys: list[Key], name: str = "Tiny", exported_as: str | None = None
) -> list[str]:
    """Texts whose IDs differ, with a base of that name, exported under another."""
    student = family_student(folder, "llama", keys=keys)
    write_tokenizer(folder, keys, name)
    file = folder / "model.gguf"
    made_from = Provenance("r", exported_as or name, "MIT", "digest")
    write_gguf(student.folder, student.folder / TOKENIZER_GGUF, file, made_from, Silent())
    tokenizer = build_tokenizer({key.key: key.value for key in keys} | {NAME: name}, folder)
    with LlamaCpp(file, threads=1, context_tokens=64) as model:
        return [
            text
            for text in texts()
            if model.tokenize(text) != tokenizer.encode(text, add_special_tokens=False).ids
        ]


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece(tmp_path: Path, space_prefix: bool) -> None:
    assert different(tmp_path, sentencepiece_keys(space_prefix)) == []


@pytest.mark.parametrize(
    ("name", "exported_as"),
    [("Phi-3 mini", "Phi-3 mini"), ("Phi3", "model"), ("Tiny", "my-phi-3-like")],
)
def test_white_space_behind_special_tokens(tmp_path: Path, name: str, exported_as: str) -> None:
    """llama.cpp drops it for models with Phi-3 in their name. Of white space beyond ASCII it drops
    nothing, and `tokenizers` does: left out here, and seen by `verify`."""
    found = different(tmp_path, sentencepiece_keys(True, own=("[mark]",)), name, exported_as)
    assert [text for text in found if "\u00a0" not in text] == []


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_byte_level(tmp_path: Path, pre: str) -> None:
    keys = [
        Key(key.key, key.type, key.element, pre if key.key == "tokenizer.ggml.pre" else key.value)
        for key in tiny.tokenizer_keys()
    ]
    assert different(tmp_path, keys) == []


def test_merges_are_ranked_by_what_they_make() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "abab": 3, "ba": 4, "aba": 5}
    merges = score_merges(vocabulary, [0.0, 0.0, -3.0, -1.0, -2.0, -1.0])
    assert merges == [("ab", "ab"), ("aba", "b"), ("a", "ba"), ("ab", "a"), ("b", "a"), ("a", "b")]


@pytest.mark.parametrize(
    ("token", "changed", "said"),
    [("<0x7F>", "gone", "lacks 1 of 256"), ("ing", "iñg", "'iñg' has a character that is no")],
)
def test_what_cannot_be_exact_is_refused(
    tmp_path: Path, token: str, changed: str, said: str
) -> None:
    values: dict[str, Any] = {key.key: key.value for key in sentencepiece_keys(True)}
    tokens = [changed if own == token else own for own in values["tokenizer.ggml.tokens"]]
    with pytest.raises(WeightsError, match=said):
        build_tokenizer(values | {"tokenizer.ggml.tokens": tokens}, tmp_path)


def test_white_space_that_is_a_token_and_stripped_is_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {key.key: key.value for key in sentencepiece_keys(True)}
    with pytest.raises(WeightsError, match="is white space"):
        build_tokenizer(values | {NAME: "Phi-3"}, tmp_path)


def test_a_missing_bos_key_means_llama_cpps_default() -> None:
    values: dict[str, Any] = {key.key: key.value for key in sentencepiece_keys(True)}
    del values["tokenizer.ggml.add_bos_token"]
    assert tokenizer_config(values)["add_bos_token"] is True
    assert tokenizer_config(values | {"tokenizer.ggml.model": "gpt2"})["add_bos_token"] is False
