"""A `tokenizers.Tokenizer` from the `tokenizer.*` keys of a GGUF file, with llama.cpp's token IDs.

What the `tokenizers` library cannot express exactly is refused. Source: llama.cpp's
src/llama-vocab.cpp. There is no Unicode normalization, also where the model's authors had one
(Qwen: NFC), because llama.cpp has none and the device runs llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.errors import WeightsError

NAME = "general.name"
STRIPS = "strips_after_special"  # of tokenizer_config.json, ours
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType

# llama.cpp's regular expressions, applied one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
QWEN2 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "qwen2": (QWEN2,),
    "llama-bpe": (LLAMA3,),
    "tekken": (TEKKEN,),
}
# A word that is a token of its own is taken whole, and a BOS is the default.
WHOLE_WORDS = ("llama-bpe", "tekken")
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Key:
    """One GGUF key: `type` and `element` (of an array) are names of gguf.GGUFValueType."""

    key: str
    type: str
    element: str | None
    value: Any


def build_tokenizer(values: Mapping[str, Any], where: Path) -> Any:
    """The tokenizer of the GGUF keys `values`; NAME among them where the file has one.

    Raises:
        WeightsError: another tokenizer than byte-level BPE with a known pre-tokenizer or
            SentencePiece's BPE, or one that cannot be built exactly.
    """
    model = values.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(values, where)
    elif model == "llama":
        tokenizer = _sentencepiece(values, where)
    else:
        known = "byte-level BPE ('gpt2') and SentencePiece ('llama')"
        _refuse(where, f"tokenizer model {model!r} is not supported, only {known}")
    _add_special(tokenizer, values, where)
    return tokenizer


def tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` for the same keys."""
    tokens = values["tokenizer.ggml.tokens"]

    def token(name: str) -> str | None:
        index = values.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding") or token("eos"),
        "unk_token": token("unknown"),
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", _default_bos(values))),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": values.get("tokenizer.chat_template"),
    }
    return config | ({STRIPS: True} if strips_after_special(values.get(NAME, "")) else {})


def strips_after_special(name: str) -> bool:
    """Whether llama.cpp drops white space behind special tokens, which it tells from the model's
    `general.name`."""
    return any(part in name.lower() for part in ("phi-3", "phi3"))


def _default_bos(values: Mapping[str, Any]) -> bool:
    pre = values.get("tokenizer.ggml.pre")
    return values.get("tokenizer.ggml.model") == "llama" or pre in WHOLE_WORDS


def _byte_level(values: Mapping[str, Any], where: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models

    name = values.get("tokenizer.ggml.pre", "none")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        _refuse(where, f"pre-tokenizer {name!r} is not among {known}")
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    own = {"ignore_merges": True} if name in WHOLE_WORDS else {}
    ids = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, **own))
    except Exception as error:  # `tokenizers` raises nothing narrower
        _refuse(where, f"its merges and tokens do not go together: {error}")
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(name: str) -> Any:
    """One of PRE_TOKENIZERS as a `tokenizers.pre_tokenizers.PreTokenizer`."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    splits = [pre.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(values: Mapping[str, Any], where: Path) -> Any:
    """Merging by score is BPE whose merges are ranked by the score of what they make.

    llama.cpp takes the leftmost of equal scores and BPE the lower rank; `verify` compares the IDs
    of every prompt and answer, so a text where that matters would be named there.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = values["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    _check_sentencepiece(values, vocabulary, where)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            score_merges(vocabulary, values["tokenizer.ggml.scores"]),
            byte_fallback=True,
        )
    )
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    escape = normalizers.Replace(" ", SPACE)
    # Applied to each piece of text between special tokens, as llama.cpp does.
    before = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, escape])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def score_merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best score of the made token first."""
    found = []
    for token, index in vocabulary.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], index, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _check_sentencepiece(
    values: Mapping[str, Any], vocabulary: Mapping[str, int], where: Path
) -> None:
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        _refuse(where, f"its SentencePiece vocabulary lacks {len(missing)} of 256 byte tokens")
    kinds = values["tokenizer.ggml.token_type"]
    # Found whole in the text before anything is merged, or never: merged text has no spaces.
    merged = (t for t, i in vocabulary.items() if kinds[i] == NORMAL and " " not in t)
    # llama.cpp merges by the text alone, BPE only what is a token by itself.
    odd = next((t for t in merged if any(character not in vocabulary for character in t)), None)
    if odd is not None:
        _refuse(where, f"its token {odd!r} has a character that is no token: cannot be exact")


def _add_special(tokenizer: Any, values: Mapping[str, Any], where: Path) -> None:
    from tokenizers import AddedToken

    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    strips = strips_after_special(values.get(NAME, ""))
    for kind, add in (
        (USER_DEFINED, tokenizer.add_tokens),
        (UNKNOWN, tokenizer.add_special_tokens),
        (CONTROL, tokenizer.add_special_tokens),
    ):
        found = [token for token, own in zip(tokens, kinds, strict=True) if own == kind]
        spaced = next((token for token in found if token[:1].isspace()), None)
        if strips and spaced is not None:  # llama.cpp strips it away, `tokenizers` finds it first
            _refuse(where, f"its special token {spaced!r} is white space, which is stripped here")
        add(
            [
                AddedToken(
                    token,
                    normalized=False,
                    special=kind != USER_DEFINED,
                    rstrip=strips and token not in UNSTRIPPED,
                )
                for token in found
            ]
        )


def _refuse(where: Path, what: str) -> NoReturn:
    raise WeightsError(what, where=str(where), hint="choose another student.weights")
