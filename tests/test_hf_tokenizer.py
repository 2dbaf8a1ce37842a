"""A Hugging Face tokenizer becomes the llama.cpp tokenizer that it is, or is refused."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiny
from hf_folders import change, save_tokenizer, sentencepiece, train_byte_level, write
from tiny_families import family_student

from edgedistill.errors import WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.gguf_tokenizer import PRE_TOKENIZERS
from edgedistill.hard_texts import HARD
from edgedistill.hf_tokenizer import first_difference, tokenizer_keys_of
from edgedistill.progress import Silent
from edgedistill.runtime import LlamaCpp
from edgedistill.student import TOKENIZER_GGUF, write_tokenizer

SPACED = "tokenizer.ggml.add_space_prefix"
SINGLE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}


def found(folder: Path, rows: int | None = None) -> dict[str, Any]:
    """Values by key; by default the model has as many rows as tokens."""
    if rows is None:
        says = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        ids = [*says["model"]["vocab"].values(), *(token["id"] for token in says["added_tokens"])]
        rows = max(ids) + 1
    return {key.key.split(".", 1)[1]: key.value for key in tokenizer_keys_of(folder, rows)[0]}


def adding(folder: Path, *around: str) -> None:
    """Let the tokenizer put special tokens in front of ("...") and behind a text."""
    file = folder / "tokenizer.json"
    says = json.loads(file.read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in says["added_tokens"]}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "..."
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in around
    ]
    special = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in around if name != "..."
    }
    change(file, post_processor={**SINGLE, "single": single, "special_tokens": special})


@pytest.mark.parametrize("kind", list(PRE_TOKENIZERS))
def test_each_pre_tokenizer_is_found(tmp_path: Path, kind: str) -> None:
    made = train_byte_level(kind, ignore_merges=kind == "llama-bpe", composes=kind == "qwen2")
    keys = found(save_tokenizer(tmp_path, made))
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", kind)
    tokens, kinds = keys["ggml.tokens"], keys["ggml.token_type"]
    assert [made.id_to_token(i) for i in range(len(tokens))] == tokens
    assert kinds[tokens.index("<|im_end|>")] == 3
    assert kinds[tokens.index("<tool_call>")] == 4
    assert tokens[keys["ggml.eos_token_id"]] == "<|im_end|>"


def test_a_foreign_expression_is_refused_with_a_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, train_byte_level("foreign"))
    with pytest.raises(WeightsError, match=r"the nearest, llama-bpe, differs on \d+ .* such as '"):
        found(tmp_path)


@pytest.mark.parametrize("ignores", [True, False])
def test_a_token_that_no_merge_makes_tells_whole_words(tmp_path: Path, ignores: bool) -> None:
    """Llama 3 takes a word that is a token whole; llama.cpp has no name for its expression
    without that here."""
    save_tokenizer(tmp_path, train_byte_level("llama-bpe", ignores))
    file = tmp_path / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"]
    parts = {part for merge in model["merges"] for part in merge}
    last = next(m for m in reversed(model["merges"]) if re.fullmatch("[a-z]+", "".join(m)))
    assert "".join(last) not in parts
    change(file, model={**model, "merges": [m for m in model["merges"] if m != last]})
    if ignores:
        assert found(tmp_path)["ggml.pre"] == "llama-bpe"
        return
    with pytest.raises(WeightsError, match="the nearest, llama-bpe, differs"):
        found(tmp_path)


def test_composing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """llama.cpp has no Unicode normalization, Qwen has NFC."""
    made = train_byte_level("qwen2", composes=True)
    assert any(unicodedata.normalize("NFC", text) != text for text in HARD)
    write_tokenizer(tmp_path / "own", tokenizer_keys_of(save_tokenizer(tmp_path, made), 710)[0])
    texts = [("a", "e\u0301tat"), ("b", "état")]
    assert first_difference(tmp_path, tmp_path / "own", texts) is None


def test_a_prompt_with_other_tokens_is_named(tmp_path: Path) -> None:
    keys = tokenizer_keys_of(save_tokenizer(tmp_path / "a", train_byte_level("qwen2")), 710)[0]
    write_tokenizer(tmp_path / "own", keys)
    save_tokenizer(tmp_path / "b", train_byte_level("gpt-2"))
    texts = [("p1", "a"), ("p2", "DON'T 2026\n\n  x")]
    assert first_difference(tmp_path / "a", tmp_path / "own", texts) is None
    assert first_difference(tmp_path / "b", tmp_path / "own", texts) == texts[1]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_by_merge_ranks(tmp_path: Path, prefix: bool) -> None:
    keys = found(save_tokenizer(tmp_path, sentencepiece(prefix)))
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("llama", "default")
    assert keys["ggml.add_space_prefix"] is prefix
    assert keys["ggml.add_bos_token"] is True
    assert keys["ggml.token_type"][:3] == [2, 3, 3]
    assert keys["ggml.token_type"][6:262] == [6] * 256


def test_a_space_in_front_of_the_first_word_only_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, sentencepiece(True, scheme="first"))
    with pytest.raises(WeightsError, match="is proven to give its token IDs"):
        found(tmp_path)


def test_stripping_is_for_the_tokens_that_llama_cpp_knows(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, train_byte_level("qwen2"))
    added = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    change(tmp_path / "tokenizer.json", added_tokens=[{**each, "rstrip": True} for each in added])
    with pytest.raises(WeightsError, match="for Phi-3's only"):
        found(tmp_path)


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    made = train_byte_level("qwen2")
    save_tokenizer(tmp_path, made)
    count = made.get_vocab_size()
    keys = found(tmp_path, count + 3)
    assert keys["ggml.tokens"][-1] == f"[PAD{count + 2}]"
    assert keys["ggml.token_type"][-4:] == [4, 5, 5, 5]
    with pytest.raises(WeightsError, match=f"embedding {count - 1} rows"):
        found(tmp_path, count - 1)


@pytest.mark.parametrize(
    ("said", "around", "adds"),
    [
        (None, ["..."], False),
        (None, ["<|im_start|>", "..."], True),
        (False, ["<|im_start|>", "..."], False),
        (True, ["..."], True),
    ],
)
def test_a_bos_in_front(tmp_path: Path, said: bool | None, around: list[str], adds: bool) -> None:
    made = train_byte_level("qwen2")
    save_tokenizer(tmp_path, made, bos_token="<|im_start|>", add_bos_token=said)
    adding(tmp_path, *around)
    assert found(tmp_path)["ggml.add_bos_token"] is adds


def test_other_tokens_around_a_text_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, train_byte_level("qwen2"), bos_token="<|im_start|>")
    adding(tmp_path, "<|im_start|>", "...", "<|im_end|>")
    with pytest.raises(WeightsError, match="other special tokens around a text"):
        found(tmp_path)


def test_special_tokens_come_from_either_place(tmp_path: Path) -> None:
    """tokenizer_config.json, generation_config.json, config.json; the template from its file."""
    save_tokenizer(tmp_path, train_byte_level("qwen2"), eos_token=None, chat_template="old")
    ids = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    start, end = (next(t["id"] for t in ids if t["content"] == name) for name in tiny.SPECIAL[1:])
    change(tmp_path / "config.json", eos_token_id=[start, end], bos_token_id=start)
    with pytest.raises(WeightsError, match="names one stop token"):
        found(tmp_path)
    write(tmp_path / "generation_config.json", {"eos_token_id": [end], "pad_token_id": start})
    (tmp_path / "chat_template.jinja").write_text("{{ new }}", "utf-8")
    keys = found(tmp_path)
    named = [keys.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown")]
    assert named == [start, end, start, None]
    assert keys["chat_template"] == "{{ new }}"


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    save_tokenizer(tmp_path, train_byte_level("qwen2"), chat_template=named)
    assert found(tmp_path)["chat_template"] == "yes"


def test_special_tokens_that_are_not_in_tokenizer_json_are_refused(tmp_path: Path) -> None:
    """transformers would add them; what then is text and what is not, nobody says."""
    made = train_byte_level("qwen2")
    listed = {str(made.token_to_id(name)): {"content": name} for name in tiny.SPECIAL}
    save_tokenizer(tmp_path, made, added_tokens_decoder=listed)
    assert found(tmp_path)["ggml.pre"] == "qwen2"
    save_tokenizer(tmp_path, made, added_tokens_decoder=listed | {"9": {"content": "<new>"}})
    with pytest.raises(WeightsError, match="lacks the token '<new>'"):
        found(tmp_path)
    save_tokenizer(tmp_path, made, eos_token="a")
    with pytest.raises(WeightsError, match="'a' is plain text"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}, "'Unigram'"),
        ({"decoder": None}, "neither byte-level"),
        ({"version": None, "model": 1}, "cannot be read"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save_tokenizer(tmp_path, train_byte_level("qwen2"))
    change(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(WeightsError, match=said):
        tokenizer_keys_of(tmp_path, 710)


KINDS = [*PRE_TOKENIZERS, "with a space", "without a space", "with a space, stripping"]
BEHIND = ("<|user|> a<|end|>\n \nb <s> c", "x</s>  y")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_as_the_source(tmp_path: Path, kind: str) -> None:
    spm = kind not in PRE_TOKENIZERS
    if spm:
        made = sentencepiece(kind.startswith("with "), strips=kind.endswith("stripping"))
    else:
        made = train_byte_level(kind)
    keys, name, _ = tokenizer_keys_of(save_tokenizer(tmp_path / "hf", made), made.get_vocab_size())
    student = family_student(tmp_path / "own", "llama", keys=keys)
    write_tokenizer(student.folder, keys, name)
    file = tmp_path / "model.gguf"
    about = Provenance("r", "Tiny", "MIT", "digest")
    write_gguf(student.folder, student.folder / TOKENIZER_GGUF, file, about, Silent())
    texts = [text for text in (*HARD, *BEHIND) if kind != "tekken" or text.isascii()]
    with LlamaCpp(file, threads=1, context_tokens=64) as model:
        different = [
            text
            for text in texts
            if model.tokenize(text) != made.encode(text, add_special_tokens=False).ids
        ]
    assert different == []
