"""Conventional GGUF file names: BaseName-SizeLabel-FineTune-Version-Encoding.gguf.

Source: ggml's docs/gguf.md, "GGUF naming convention".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ENCODINGS = r"(?:F32|F16|BF16|I?Q\d+_[A-Z0-9_]+)"
ONNX_ENCODINGS = r"(?:fp32|int[48]-b\d+(?:-[a-z0-9]+)*)"
SIZE = re.compile(r"\d+(?:\.\d+)?[KMBT]", re.IGNORECASE)


@dataclass(frozen=True)
class NameParts:
    """What a base model's name says: "org/SmolLM2-135M-Instruct" is SmolLM2, 135M, Instruct."""

    base: str
    size_label: str
    finetune: str


def name_parts(model: str, parameters: int) -> NameParts:
    """Split a base model's name; the size label comes from it, or else from the parameter count."""
    name = re.sub(rf"[-.]{ENCODINGS}$", "", model.rsplit("/", 1)[-1], flags=re.IGNORECASE)
    words = [word for word in re.split(r"[\s-]+", name) if word]
    for i, word in enumerate(words):
        if i and SIZE.fullmatch(word):
            return NameParts("-".join(words[:i]), word.upper(), "-".join(words[i + 1 :]))
    return NameParts("-".join(words) or "model", size_label(parameters), "")


def size_label(parameters: int) -> str:
    """Parameter count in two or more digits: 134515008 is "135M", 1543714304 is "1.5B"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if parameters >= unit:
            return _two_digits(parameters / unit) + letter
    return _two_digits(parameters / 1e3) + "K"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def onnx_name(base: str, parameters: int, finetune: str, version: str, encoding: str) -> str:
    """Folder name of an ONNX model, of the same parts as a GGUF file's."""
    return gguf_name(base, parameters, finetune, version, encoding).removesuffix(".gguf")


def gguf_name(base: str, parameters: int, finetune: str, version: str, encoding: str) -> str:
    """File name of a fine-tune called `finetune` of the base model `base`.

    Example: ("SmolLM2-135M-Instruct", 134515008, "support-sql", "v1.0", "Q8_0") gives
    "SmolLM2-135M-Instruct-support-sql-v1.0-Q8_0.gguf".
    """
    parts = name_parts(base, parameters)
    words = (parts.base, parts.size_label, parts.finetune, finetune, version, encoding)
    return "-".join(word for word in words if word) + ".gguf"


def with_encoding(name: str, encoding: str) -> str:
    """The same name of a GGUF file or an ONNX folder with another encoding at its end."""
    if not name.endswith(".gguf"):
        return re.sub(rf"-{ONNX_ENCODINGS}$", "", name) + f"-{encoding}"
    return re.sub(rf"-{ENCODINGS}\.gguf$", "", name).removesuffix(".gguf") + f"-{encoding}.gguf"
