"""Bytes of a tokenizer's tokens, and the token that begins a piece of text.

Byte-level BPE writes each byte as one of 256 printable characters (GPT-2, `bytes_to_unicode`);
SentencePiece's BPE writes a space as U+2581 and, by byte fallback, a byte as `<0xXX>`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgedistill.errors import WeightsError

SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = tuple(byte for byte in range(256) if byte not in PRINTABLE)
CHARACTER = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + place) for place, byte in enumerate(OTHERS)
}
BYTE = {character: byte for byte, character in CHARACTER.items()}
CONTINUING = bytes(range(0x80, 0xC0))  # what follows the first byte of a character
REMEMBERED = 1 << 20  # pieces whose first token is kept


class Vocabulary:
    """Token bytes of a `tokenizer.json`, given as its text and as `tokenizers.Tokenizer`.

    `stop_id`: the token that ends an answer.

    Raises:
        WeightsError: neither byte-level BPE nor BPE with byte fallback.
    """

    def __init__(self, file: Path, tokenizer: Any, stop_id: int) -> None:
        layout = json.loads(file.read_text("utf-8"))
        model, decoder = layout["model"], json.dumps(layout.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        if model.get("type") != "BPE" or not (self._byte_level or model.get("byte_fallback")):
            raise WeightsError(
                "the bytes of this tokenizer's tokens are not known: it is neither byte-level BPE "
                "nor BPE with byte fallback",
                where=str(file),
                hint="a method that learns from log-probabilities needs such a student",
            )
        self.stop_id = stop_id
        self._model = tokenizer.model
        self._pre_tokenizer = tokenizer.pre_tokenizer if self._byte_level else None
        added: dict[int, bool] = {
            entry["id"]: entry["special"] for entry in layout.get("added_tokens", ())
        }
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._bytes: dict[int, bytes | None] = {}
        for token, index in vocabulary.items():
            if index not in added:
                self._bytes[index] = self._decoded(token)
            else:
                self._bytes[index] = None if added[index] else token.encode("utf-8")
        # Taken whole from a text before anything is merged, the longest first.
        own = [(spelled, index) for index in added if (spelled := self._bytes.get(index))]
        self._own = sorted(own, key=lambda found: -len(found[0]))
        # Of tokens with the same bytes, a byte is the one that is written only for want of others.
        fallen_back = {i for t, i in vocabulary.items() if BYTE_TOKEN.fullmatch(t)}
        order = sorted(self._bytes, key=lambda index: (index not in fallen_back, -index))
        self._ids = {spelled: index for index in order if (spelled := self._bytes[index])}
        self._first: dict[bytes, int | None] = {}

    def token_bytes(self, index: int) -> bytes | None:
        """What a token writes; None for a special one, which writes nothing, and for no token. A
        SentencePiece token keeps its leading space."""
        return self._bytes.get(index)

    def first(self, piece: bytes) -> int | None:
        """The token with which a text goes on whose next bytes are `piece`, as far as those tell:
        the one that is exactly `piece`, else the first one that encoding it gives. None: it cannot
        be written. The end of `piece` may be inside a character, and so may its beginning."""
        if piece not in self._first:
            if len(self._first) >= REMEMBERED:
                self._first.clear()
            self._first[piece] = self._ids.get(piece) if piece in self._ids else self._cut(piece)
        return self._first[piece]

    def _decoded(self, token: str) -> bytes | None:
        if self._byte_level:
            known = all(character in BYTE for character in token)
            return bytes(BYTE[character] for character in token) if known else None
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode("utf-8")

    def _cut(self, piece: bytes) -> int | None:
        own = next((index for token, index in self._own if piece.startswith(token)), None)
        if own is not None:
            return own
        text, rest = _characters(piece)
        if self._byte_level:
            return self._merged(self._mapped(text, rest))
        # Half a character is written byte by byte.
        return self._merged(text.replace(" ", SPACE)) if text else self._ids.get(rest[:1])

    def _mapped(self, text: str, rest: bytes) -> str:
        """The printable characters of what merging starts with: the first word of the text."""
        tail = "".join(CHARACTER[byte] for byte in rest)
        if not text or self._pre_tokenizer is None:
            return "".join(CHARACTER[byte] for byte in text.encode("utf-8")) + tail
        words = self._pre_tokenizer.pre_tokenize_str(text)
        return str(words[0][0]) + (tail if len(words) == 1 else "")

    def _merged(self, word: str) -> int | None:
        tokens = self._model.tokenize(word) if word else []
        return int(tokens[0].id) if tokens else None


def _characters(piece: bytes) -> tuple[str, bytes]:
    """The text that `piece` begins with, and the bytes of half a character behind it; no text where
    it begins inside a character: then the bytes up to the next one."""
    inside = len(piece) - len(piece.lstrip(CONTINUING))
    if inside:
        return "", piece[:inside]
    try:
        return piece.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        return piece[: error.start].decode("utf-8"), piece[error.start : error.end]
