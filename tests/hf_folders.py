"""Hugging Face model folders as their authors publish them, with random weights and tokenizers that
were trained on a few lines: small, and in the forms that tokenizer.json really has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
from tiny_families import SENTENCEPIECE_TEMPLATE, family_student

from edgedistill.hard_texts import HARD
from edgedistill.student import TOKENIZER_GGUF

# The expressions of the models' own tokenizer.json, not llama.cpp's.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FOREIGN = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,2}|")
PATTERNS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "tekken": TEKKEN, "foreign": FOREIGN}
LINES = (
    *HARD,
    "the ticket 1234 of 2026-05-18 isn't solved, and they'll call again at 12:34\n\n    again",
    "naïve café, the thing's 123456 and 'LL 'S DON'T, e\u0301t e\u0301tat",
)


def train_byte_level(kind: str, ignore_merges: bool = False, composes: bool = False) -> Any:
    """A `tokenizers.Tokenizer` cut as `kind` says, in the form the models have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if kind == "gpt-2":
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    elif kind == "smollm":
        digits = pre.Digits(individual_digits=True)
        words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        made.pre_tokenizer = pre.Sequence([digits, words])
    else:
        split = pre.Split(Regex(PATTERNS[kind]), "isolated")
        bare = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre.Sequence([split, bare])
    if composes:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    made.train_from_iterator(LINES * 3, trainer)
    made.add_special_tokens(list(tiny.SPECIAL))
    made.add_tokens(["<tool_call>"])
    return made


def sentencepiece(prefix: bool, scheme: str | None = None, strips: bool = False) -> Any:
    """A SentencePiece BPE as Llama 2 (`prefix`) and Gemma have it; `scheme`: as Metaspace;
    `strips`: white space behind special tokens goes, as in Phi-3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=500, min_frequency=1, show_progress=False)
    trained.train_from_iterator([line for line in LINES if line.isascii()] * 3, trainer)
    pieces = trained.get_vocab()
    whole = ["<unk>", "<s>", "<|endoftext|>"]  # behind them white space stays, in Phi-3 too
    special = [*whole[:2], "</s>", whole[2], "<|user|>", "<|end|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted((piece for piece in pieces if piece not in tokens), key=pieces.__getitem__)
    ids = {token: index for index, token in enumerate(tokens)}
    made_ranks = json.loads(trained.to_str())["model"]["merges"]
    ranks: dict[str, int] = {}
    for left, right in made_ranks:
        ranks.setdefault(left + right, len(ranks))
    # As transformers makes them of a SentencePiece model: every pair that makes the piece.
    merges = sorted(
        (ranks[token], at, (token[:at], token[at:]))
        for token in ranks
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    )
    made = Tokenizer(
        models.BPE(
            ids, [pair for *_, pair in merges], byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    if scheme is not None:
        made.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme, split=False)
    else:
        front = [normalizers.Prepend("▁")] if prefix else []
        made.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    made.add_special_tokens(
        [
            AddedToken(token, normalized=False, rstrip=strips and token not in whole)
            for token in special
        ]
    )
    return made


def save_tokenizer(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """tokenizer.json and tokenizer_config.json; of `changes` None leaves a field out."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    chatml = tokenizer.token_to_id("<|im_end|>") is not None
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if chatml else "<s>",
        "eos_token": {"content": "<|im_end|>"} if chatml else "</s>",
        "unk_token": None if chatml else "<unk>",
        "add_bos_token": not chatml,
        "chat_template": tiny.TEMPLATE if chatml else SENTENCEPIECE_TEMPLATE,
        **changes,
    }
    write(folder / "tokenizer_config.json", {k: v for k, v in said.items() if v is not None})
    if not (folder / "config.json").exists():
        write(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    return folder


def model_folder(folder: Path, name: str = "llama", keys: Any = None, **changes: Any) -> Path:
    """A folder of one of tiny_families' models, as transformers saves it."""
    family_student(folder, name, keys=keys, **changes)
    (folder / TOKENIZER_GGUF).unlink()
    return folder


def write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value), "utf-8")


def change(file: Path, **changes: Any) -> None:
    """Rewrite fields of a JSON file; None takes one out."""
    found = json.loads(file.read_text("utf-8")) | changes
    write(file, {name: value for name, value in found.items() if value is not None})
