"""Bytes of tokens, and the token that begins a piece, against what the tokenizer itself gives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
from tiny_families import sentencepiece_keys

from edgedistill.errors import WeightsError
from edgedistill.prompting import TOKENIZER, StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import Key, write_tokenizer
from edgedistill.vocabulary import Vocabulary

TEXTS = ("the others", " in the canoe", "näïve 中文 🙂", " \n\t x", "12 on and on", "日本 abab é")
SPM = {"sentencepiece": False, "sentencepiece with a space in front": True}


def shown(folder: Path, keys: list[Key]) -> StudentPrompt:
    write_tokenizer(folder, keys)
    return StudentPrompt(folder, StudentSpec(weights="w"))


@pytest.fixture(params=["byte-level", *SPM], scope="module")
def prompt(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> StudentPrompt:
    keys = tiny.tokenizer_keys()
    if request.param in SPM:
        keys = sentencepiece_keys(SPM[request.param])
    return shown(tmp_path_factory.mktemp("tokenizer"), keys)


@pytest.fixture(scope="module")
def vocabulary(prompt: StudentPrompt) -> Vocabulary:
    return prompt.vocabulary()


def puts_space(prompt: StudentPrompt) -> bool:
    return prompt.decode(prompt.encode("x")[:1]) == "" or len(prompt.encode("x")) == 2


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_their_text(prompt: StudentPrompt, vocabulary: Vocabulary, text: str) -> None:
    written = b"".join(vocabulary.token_bytes(i) or b"?" for i in prompt.encode(text))
    assert written == b" " * puts_space(prompt) + text.encode()


def test_special_tokens_write_nothing(prompt: StudentPrompt, vocabulary: Vocabulary) -> None:
    assert vocabulary.stop_id == prompt.stop_id
    assert vocabulary.token_bytes(prompt.stop_id) is None
    assert vocabulary.token_bytes(10**9) is None


def test_the_first_token_is_the_tokenizers_own(
    prompt: StudentPrompt, vocabulary: Vocabulary
) -> None:
    chance = random.Random(0)
    for _ in range(500):
        text = "".join(chance.choice([*"theinaobr 12é中\n", "🙂"]) for _ in range(6))
        ids = prompt.encode(text)
        if puts_space(prompt):  # a piece has no space of its own in front
            ids = prompt.encode(f"x{text}")[len(prompt.encode("x")) :]
            if prompt.encode(f"x{text}")[: len(prompt.encode("x"))] != prompt.encode("x"):
                continue
        assert vocabulary.first(text.encode()) == ids[0]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character(vocabulary: Vocabulary, cut: int) -> None:
    smile = "🙂".encode()
    start, rest = vocabulary.first(smile[:cut]), vocabulary.first(smile[cut:])
    assert start is not None
    assert rest is not None
    assert vocabulary.token_bytes(start) == smile[:1]
    assert vocabulary.token_bytes(rest) == smile[cut : cut + 1]
    assert vocabulary.first(b"e" + smile[:cut]) == vocabulary.first(b"e")


def test_every_token_begins_its_own_bytes(prompt: StudentPrompt, vocabulary: Vocabulary) -> None:
    for index in range(prompt.vocab_size):
        spelled = vocabulary.token_bytes(index)
        if spelled:
            assert vocabulary.token_bytes(vocabulary.first(spelled) or 0) == spelled


def test_tokens_taken_whole(tmp_path: Path) -> None:
    vocabulary = shown(tmp_path, sentencepiece_keys(False)).vocabulary()
    found = vocabulary.first(b"\n\nand")
    assert found is not None
    assert vocabulary.token_bytes(found) == b"\n\n"


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    prompt = shown(tmp_path, tiny.tokenizer_keys())
    file = tmp_path / TOKENIZER
    layout = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**layout, "decoder": None}), "utf-8")
    with pytest.raises(WeightsError, match="byte-level BPE"):
        prompt.vocabulary()
