"""The base student's tokenizer, and its conversion from GGUF."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tokenizer_keys

from edgedistill.errors import WeightsError
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp
from edgedistill.student import (
    TOKENIZER_GGUF,
    Key,
    build_tokenizer,
    prepare_student,
    read_tokenizer_keys,
    write_tokenizer,
)
from edgedistill.weights import cached

NAME = "smollm2-135m-instruct-q4_1"
POOL = (
    "abXYZ0189 \t\n'\u2019\".,;:!?()[]{}<>|=+-*/\\_@#$%^&~`"
    "éüß日本語한국あア😀👍🏽é½²Ⅷ٣\u00a0\u3000\u200d"
)
PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    " the",
    " SELECT",
    "2026-05-18",
    "'s",
    "  ",
    "\n\n",
)
WHOLE = (
    "it's we'll I'D don't",
    "    def f(x):\n        return x**2\n\n\n",
    "flag 🇩🇪 family 👩‍👩‍👧🏽",
    "e\u0301 decomposed \ufeff\u2028",
    "SELECT COUNT(*) FROM t WHERE a = 'b' AND n >= 1000000",
    "\x00\x01\x7f",
)


def strings() -> Iterator[str]:
    chance = random.Random(0)
    yield from WHOLE
    for _ in range(100):
        length = chance.randrange(1, 30)
        yield "".join(
            chance.choice(PIECES if chance.random() < 0.15 else POOL) for _ in range(length)
        )


def test_every_tokenizer_key_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_keys())
    kept = [Key(**entry) for entry in json.loads((tmp_path / TOKENIZER_GGUF).read_text("utf-8"))]
    assert kept == tokenizer_keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "'viking' is not among"),
        ({"tokenizer.ggml.pre": None}, "is not among"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "lacks 256 of 256 byte tokens"),
    ],
)
def test_unknown_tokenizer_is_refused_by_name(
    tmp_path: Path, changes: dict[str, str | None], said: str
) -> None:
    values = {key.key: key.value for key in tokenizer_keys()} | changes
    with pytest.raises(WeightsError, match=said):
        build_tokenizer(values, tmp_path)


def test_control_tokens_are_parsed_and_digits_split(tmp_path: Path) -> None:
    values = {key.key: key.value for key in tokenizer_keys()}
    one = build_tokenizer(values, tmp_path).encode("12<|im_end|>", add_special_tokens=False)
    digits = build_tokenizer(values | {"tokenizer.ggml.pre": "smollm"}, tmp_path).encode("12")
    assert one.tokens == ["12", "<|im_end|>"]
    assert digits.tokens == ["1", "2"]


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(WeightsError, match="not a readable GGUF"):
        read_tokenizer_keys(tmp_path / "x.gguf")


@pytest.mark.integration
def test_token_ids_are_those_of_llama_cpp(tmp_path: Path) -> None:
    file = cached(NAME)
    if file is None:
        pytest.skip(f"the weights {NAME} are not on this machine; a build fetches them")
    write_tokenizer(tmp_path, read_tokenizer_keys(file))
    prompt = StudentPrompt(tmp_path, StudentSpec(weights=NAME))
    with LlamaCpp(file, threads=1, context_tokens=64) as model:
        different = [text for text in strings() if model.tokenize(text) != prompt.encode(text)]
    assert different == []


@pytest.mark.integration
def test_student_is_fp32_and_keeps_no_sampling_settings(tmp_path: Path) -> None:
    if cached(NAME) is None:
        pytest.skip(f"the weights {NAME} are not on this machine; a build fetches them")
    done = prepare_student(StudentSpec(weights=NAME), tmp_path, Silent())
    config = json.loads((done.folder / "config.json").read_text("utf-8"))
    settings = json.loads((done.folder / "generation_config.json").read_text("utf-8"))
    assert config["dtype"] == "float32"
    assert set(settings) <= {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
    }
