"""Answers that an embedding model places close together."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from edgedistill.errors import DatasetError, MissingTool

CACHED = 4096
MAX_TOKENS = 256  # what such models were trained with; more of a text is not read


class EmbeddingChecker:
    """Cosine of the mean of the last layer's token vectors (Reimers and Gurevych 2019,
    arXiv 1908.10084).

    Raises (when it is made):
        MissingTool: torch or transformers is not installed.
        DatasetError: the folder holds no such model.
    """

    def __init__(self, model: Path, min_cosine: float) -> None:
        self._min_cosine = min_cosine
        self._tokenizer, self._model = _load(model)
        self._of = functools.lru_cache(CACHED)(self._embed)
        self.description = (
            f"Close in meaning: a cosine of at least {min_cosine:g} between the embeddings of both "
            f"texts by {model.name} (tokens averaged, the first {MAX_TOKENS} count)."
        )

    def invalid(self, answer: str) -> str | None:
        return None if answer.strip() else "empty"

    def same(self, answer: str, teacher: str) -> bool:
        if not answer.strip() or not teacher.strip():
            return False
        return float(self._of(answer.strip()) @ self._of(teacher.strip())) >= self._min_cosine

    def _embed(self, text: str) -> Any:
        import torch

        given = self._tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**given).last_hidden_state[0]
        mean = states[given["attention_mask"][0].bool()].mean(0)
        return (mean / mean.norm()).numpy()


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingTool(
            f"the package {error.name} is not installed",
            hint='in the checkout: pip install -e ".[distill]"',
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(
            f"the check's embedding model cannot be loaded: {error}",
            where=str(folder),
            hint="`check.model` is the folder of a sentence embedding model with its tokenizer",
        ) from error
    return tokenizer, model
