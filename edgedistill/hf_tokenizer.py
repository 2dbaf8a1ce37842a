"""From a Hugging Face tokenizer to the `tokenizer.*` keys of a GGUF file, proven and never guessed.

Which of llama.cpp's tokenizers it is, tokenizer.json does not say. Each that could be is built
(gguf_tokenizer.py) and has to give the IDs of tokenizer.json on hard texts, on every token's own
text, on tokens side by side and around special tokens; where none does, the model is refused.
"""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.errors import MissingTool, WeightsError
from edgedistill.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NAME,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNSTRIPPED,
    UNUSED,
    USER_DEFINED,
    Key,
    build_tokenizer,
    pre_tokenizer,
)
from edgedistill.hard_texts import HARD, POOL
from edgedistill.hf_config import of_folder
from edgedistill.prompting import TOKENIZER

MIXED, JOINED = 400, 8  # random texts; tokens in one text
DIALECT = (
    "llama.cpp's {pre} cuts letters beyond ASCII that have a case, and combining marks, otherwise "
    "than tokenizer.json; the student learns it as llama.cpp does"
)


def tokenizer_keys_of(folder: Path, rows: int) -> tuple[list[Key], str, list[str]]:
    """The keys for a model folder whose embedding has `rows` rows; the `general.name` that
    llama.cpp's tokenizer needs (gguf_tokenizer.strips_after_special); and what is to be told.

    Raises:
        WeightsError: no tokenizer of llama.cpp is proven to give the same IDs; names a text.
    """
    return _Folder(folder, rows).keys()


def first_difference(
    folder: Path, student: Path, texts: Iterable[tuple[str, str]]
) -> tuple[str, str] | None:
    """The first (label, text) whose IDs in the folder of a student are not those that the model
    folder has for it."""
    source, own = _Source(folder), _Source(student)
    dialect = "tekken" if _is_tekken(own.says.get("pre_tokenizer") or {}) else ""
    for label, text in texts:
        if not _beyond(dialect, text) and source.ids([text]) != own.ids([source.composed(text)]):
            return label, text
    return None


class _Source:
    """The tokenizer.json of a folder: what it says, and what it does."""

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingTool(
                "the package tokenizers is not installed",
                hint='in the checkout: pip install -e ".[build]"',
            ) from error
        self.file = folder / TOKENIZER
        try:
            text = self.file.read_text("utf-8")
            self.says: dict[str, Any] = json.loads(text)
            self.own = Tokenizer.from_str(text)
        except FileNotFoundError:
            raise WeightsError(
                f"there is no {TOKENIZER} in it",
                where=str(folder),
                hint="save the tokenizer with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
            ) from None
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise WeightsError(f"cannot be read: {error}", where=str(self.file)) from error
        self.own.no_truncation()
        self.own.no_padding()
        kinds = _types(self.says.get("normalizer"))
        self._composes = bool(kinds) and set(kinds) <= {"NFC", "Sequence"}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return _ids(self.own, texts)

    def composed(self, text: str) -> str:
        """The text whose IDs llama.cpp has to give. It has no Unicode normalization: text that
        Qwen's NFC changes is cut otherwise there, which is no reason to refuse the model."""
        return unicodedata.normalize("NFC", text) if self._composes else text


class _Folder:
    """Everything that the keys are made of."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.source, self.config = _Source(folder), of_folder(folder)
        self.file, self.model = self.source.file, self.source.says.get("model") or {}
        self.added = {entry["id"]: entry for entry in self.source.says.get("added_tokens") or ()}
        self.tokens, self.kinds = self._vocabulary(rows)
        self._require_all_added()
        self.strips = any(entry.get("rstrip") for entry in self.added.values())
        if self.strips and not {*UNSTRIPPED} <= {*self.tokens}:  # it would not load such a file
            self._refuse(
                "white space behind its special tokens goes, which llama.cpp does for Phi-3's only"
            )

    def keys(self) -> tuple[list[Key], str, list[str]]:
        """Those of the first candidate that is proven; see `tokenizer_keys_of`."""
        if self.model.get("type") != "BPE" or self.model.get("dropout"):
            self._refuse(
                f"a tokenizer of the type {self.model.get('type')!r} is not supported, only "
                "byte-level BPE and SentencePiece's BPE"
            )
        name = "Phi-3" if self.strips else ""
        made = self._sentencepiece() if self.model.get("byte_fallback") else self._byte_level()
        battery = list(dict.fromkeys(self._battery()))
        wanted = self.source.ids(battery)
        differ: list[tuple[int, str, str]] = []
        for label, keys in made:
            values = {key.key: key.value for key in keys} | {NAME: name}
            different = self._different(label, values, battery, wanted)
            if not different:
                told = [DIALECT.format(pre=label)] if label == "tekken" else []
                return keys, name, told
            differ.append((len(different), label, different[0]))
        count, label, text = min(differ)
        raise self._error(
            "none of llama.cpp's tokenizers that are known here is proven to give its token IDs: "
            f"the nearest, {label}, differs on {count} of {len(battery)} texts, such as {text!r}"
        )

    def _different(
        self, label: str, values: Mapping[str, Any], texts: Sequence[str], wanted: list[list[int]]
    ) -> list[str]:
        built = build_tokenizer(values, self.file)
        found = _ids(built, [self.source.composed(text) for text in texts])
        return [
            text
            for text, one, other in zip(texts, wanted, found, strict=True)
            if one != other and not _beyond(label, text)
        ]

    def _byte_level(self) -> Iterator[tuple[str, list[Key]]]:
        """Pre-tokenizers, first those that cut hard texts most like tokenizer.json does."""
        if "ByteLevel" not in _types(self.source.says.get("decoder")):
            self._refuse("its BPE is neither byte-level nor has it a token for every byte")
        merges = [*map(self._pair, self.model["merges"])]
        if odd := next((pair for pair in merges if any(" " in part for part in pair)), None):
            self._refuse(f"its merge {odd!r} holds a space, which GGUF cannot say")
        told = Key("tokenizer.ggml.merges", "ARRAY", "STRING", [" ".join(pair) for pair in merges])
        own = self.source.own.pre_tokenizer
        wanted = [] if own is None else [_words(own, text) for text in HARD]

        def odd_words(name: str) -> int:
            found = [_words(pre_tokenizer(name), text) for text in HARD]
            return sum(a != b for a, b in zip(wanted, found, strict=False))

        nearest = sorted(PRE_TOKENIZERS, key=odd_words)
        return ((name, self._keys("gpt2", name, told)) for name in nearest)

    def _sentencepiece(self) -> Iterator[tuple[str, list[Key]]]:
        """Merging by score: a token's score falls with the rank of the first merge that makes it;
        what no merge makes comes last, as it comes never in tokenizer.json."""
        ranks: dict[str, int] = {}
        for left, right in map(self._pair, self.model["merges"]):
            ranks.setdefault(left + right, len(ranks))
        scores = [-float(ranks.get(token, len(ranks))) for token in self.tokens]
        told = Key("tokenizer.ggml.scores", "ARRAY", "FLOAT32", scores)
        spaced = [
            token.replace(SPACE, " ") if kind == USER_DEFINED else token
            for token, kind in zip(self.tokens, self.kinds, strict=True)
        ]
        for prefix, tokens in itertools.product((True, False), (self.tokens, spaced)):
            if tokens is spaced and (spaced == self.tokens or len({*spaced}) < len(spaced)):
                continue
            label = f"llama {'with' if prefix else 'without'} a space in front"
            space = Key("tokenizer.ggml.add_space_prefix", "BOOL", None, prefix)
            yield label, self._keys("llama", "default", told, space, tokens=tokens)

    def _keys(
        self, model: str, pre: str, *more: Key, tokens: Sequence[str] | None = None
    ) -> list[Key]:
        special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {name: self.config.token_id(short, self._id) for name, short in special.items()}
        if ids["eos"] is None:
            self._refuse("neither tokenizer_config.json nor config.json names one stop token")
        for index in (ids["bos"], ids["eos"]):
            if index is not None and self.kinds[index] == NORMAL:
                self._refuse(
                    f"its special token {self.tokens[index]!r} is plain text in {TOKENIZER}"
                )
        return [
            Key("tokenizer.ggml.model", "STRING", None, model),
            Key("tokenizer.ggml.pre", "STRING", None, pre),
            Key("tokenizer.ggml.tokens", "ARRAY", "STRING", list(tokens or self.tokens)),
            Key("tokenizer.ggml.token_type", "ARRAY", "INT32", self.kinds),
            *more,
            *(
                Key(f"tokenizer.ggml.{name}_token_id", "UINT32", None, index)
                for name, index in ids.items()
                if index is not None
            ),
            Key("tokenizer.ggml.add_bos_token", "BOOL", None, self._adds_bos(ids["bos"])),
            Key("tokenizer.chat_template", "STRING", None, self.config.template),
        ]

    def _id(self, token: str | int) -> int:
        found = self.source.own.token_to_id(token) if isinstance(token, str) else token
        if found is None or found >= len(self.tokens):
            self._refuse(f"its special token {token!r} is not in its vocabulary")
        return int(found)

    def _adds_bos(self, bos: int | None) -> bool:
        """What tokenizer_config.json says, as in transformers; else what tokenizer.json does."""
        bare, whole = (
            self.source.own.encode("a", add_special_tokens=special).ids for special in (False, True)
        )
        before = whole[: len(whole) - len(bare)]
        if whole[len(before) :] != bare or before not in ([], [bos]):
            self._refuse(
                f"it puts other special tokens around a text ({whole} for {bare}) than one BOS in "
                "front"
            )
        said = self.config.adds_bos
        if (before if said is None else said) and bos is None:
            self._refuse("it is to begin with a BOS and names none")
        return bool(before) if said is None else said

    def _vocabulary(self, rows: int) -> tuple[list[str], list[int]]:
        """Token texts and types by ID; rows of the embedding without a token are unused."""
        known = self.source.own.get_vocab()
        texts = {index: text for text, index in known.items()}
        if len(texts) < len(known):
            self._refuse("two of its tokens have the same ID")
        if (most := max(texts, default=-1)) >= rows:
            self._refuse(f"it has a token {most}, and the model's embedding {rows} rows")
        tokens = [texts.get(index) or f"[PAD{index}]" for index in range(rows)]
        if len({*tokens}) < len(tokens):
            self._refuse("two of its tokens have the same text")
        return tokens, [self._kind(index, texts.get(index)) for index in range(rows)]

    def _require_all_added(self) -> None:
        """transformers adds to tokenizer.json what tokenizer_config.json lists besides."""
        for index, entry in (self.config.tokenizer.get("added_tokens_decoder") or {}).items():
            known = self.added.get(int(index))
            if known is None or known["content"] != entry["content"]:
                self._refuse(f"it lacks the token {entry['content']!r} of tokenizer_config.json")

    def _kind(self, index: int, text: str | None) -> int:
        if not text:
            return UNUSED
        if self.model.get("byte_fallback"):
            if text == self.model.get("unk_token"):
                return UNKNOWN
            if len(text) == 6 and text[:3] == "<0x" and text[5] == ">":
                return BYTE
        if index in self.added:
            return CONTROL if self.added[index].get("special") else USER_DEFINED
        return NORMAL

    def _pair(self, merge: str | Sequence[str]) -> tuple[str, str]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2:
            self._refuse(f"its merge {merge!r} is not of two parts")
        return parts[0], parts[1]

    def _battery(self) -> Iterator[str]:
        yield from HARD
        chance = random.Random(0)
        special = [self.tokens[i] for i in self.added if self.tokens[i]]
        for token in special:
            yield from (f"a{token}b", f"a {token} b", f"{token}\n\n  b{token}{token} ")
        plain = list(self._own_texts())
        yield from plain
        chance.shuffle(plain)
        yield from ("".join(some) for some in _batches(plain, JOINED))
        for _ in range(MIXED):
            yield "".join(
                chance.choice(special or [""]) if chance.random() < 0.03 else chance.choice(POOL)
                for _ in range(chance.randrange(1, 30))
            )

    def _own_texts(self) -> Iterator[str]:
        """The text of each token that is text by itself."""
        plain = [index for index, kind in enumerate(self.kinds) if kind == NORMAL]
        if self.model.get("byte_fallback"):
            yield from (self.tokens[index].replace(SPACE, " ") for index in plain)
            return
        decoded = self.source.own.decode_batch([[i] for i in plain], skip_special_tokens=False)
        yield from (text for text in decoded if text and "\ufffd" not in text)

    def _refuse(self, what: str) -> NoReturn:
        raise self._error(what)

    def _error(self, what: str) -> WeightsError:
        return WeightsError(
            f"this tokenizer cannot be carried over: {what}",
            where=str(self.file),
            hint="choose another student.weights, or a GGUF file of this model",
        )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _words(cut: Any, text: str) -> list[str]:
    return [word for word, _ in cut.pre_tokenize_str(text)]


def _types(part: Any) -> list[str]:
    """Names of a step of tokenizer.json and of those inside it."""
    if not part:
        return []
    inner = [*(part.get("normalizers") or ()), *(part.get("decoders") or ())]
    inner += part.get("pretokenizers") or ()
    return [part["type"], *(kind for each in inner for kind in _types(each))]


def _is_tekken(pre: Mapping[str, Any]) -> bool:
    (pattern,) = PRE_TOKENIZERS["tekken"]
    return any(
        (each.get("pattern") or {}).get("Regex") == pattern
        for each in pre.get("pretokenizers") or ()
    )


def _beyond(label: str, text: str) -> bool:
    """Whether llama.cpp's expression is known to differ from the original on such text: tekken's
    knows the case of ASCII letters only, and no combining marks."""
    return label == "tekken" and any(
        unicodedata.category(c) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
        for c in text
        if not c.isascii()
    )


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
