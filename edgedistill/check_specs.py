"""What a recipe may say in `check`: how two answers are compared on its task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill.endpoint_fields import KeyName, OpenBaseUrl
from edgedistill.strict import Strict


class SqlExecutionCheck(Strict):
    """Same rows when both queries are executed on a read-only database."""

    kind: Literal["sql-execution"]
    database: Path = Field(description="SQLite file, opened read-only")
    timeout_seconds: float = Field(2.0, gt=0, description="longest run of one query")


class TextCheck(Strict):
    """Comparison of the answers' text: exact, as a label, as JSON, or by their last number."""

    kind: Literal["exact", "label", "json", "number"]
    labels: tuple[str, ...] = Field((), description="label: the allowed ones")
    tolerance: float = Field(1e-6, ge=0, description="number: largest relative difference")


class RegexCheck(Strict):
    """Same text in what a pattern finds."""

    kind: Literal["regex"]
    pattern: str = Field(
        description="Python regular expression; its first group, or all of it where it has none, "
        "is compared, of the last place it is found"
    )
    ignore_case: bool = Field(True, description="in the pattern and in what is compared")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return pattern


class RougeCheck(Strict):
    """Enough of the same words in the same order (ROUGE-L: Lin 2004)."""

    kind: Literal["rouge"]
    min_f1: float = Field(0.7, gt=0, le=1, description="F1 from which two answers say the same")


class EmbeddingCheck(Strict):
    """Answers that an embedding model places close together."""

    kind: Literal["embedding"]
    model: Path = Field(
        description="folder of a sentence embedding model in Hugging Face's layout; tokens are "
        "averaged"
    )
    min_cosine: float = Field(0.85, gt=0, le=1, description="similarity from which they are same")


class PythonCheck(Strict):
    """A function of your own, in a process of its own."""

    kind: Literal["python"]
    file: Path = Field(
        description="Python file with `same(answer, teacher) -> bool` and, if you like, "
        "`invalid(answer) -> str | None`, why it is no answer at all"
    )
    timeout_seconds: float = Field(5.0, gt=0, description="longest run of one call")


class JudgeCheck(Strict):
    """A language model says whether two answers say the same."""

    kind: Literal["judge"]
    model: str = Field(description="model ID sent with every call")
    base_url: OpenBaseUrl | None = Field(
        None,
        description="what the client puts /chat/completions behind, e.g. https://host/v1",
    )
    weights: Path | None = Field(
        None, description="instead of base_url: a GGUF file, served on this machine"
    )
    api_key_env: KeyName | None = Field(
        None,
        description="name of the environment variable that holds the key; leave it out for no key",
    )
    rubric: str = Field("", description="what counts on this task, in a few sentences")
    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature; 0 is greedy")
    max_tokens: int = Field(
        512, ge=1, description="longest answer, in tokens; a model that thinks first needs many"
    )
    context_tokens: int = Field(4096, ge=128, description="weights: context window, in tokens")
    timeout_seconds: float = Field(120, gt=0, description="longest wait for one answer")
    attempts: int = Field(3, ge=1, le=20, description="tries of one call before it is failed")
    kept_in: Path | None = Field(
        None,
        exclude=True,
        description="SQLite file that keeps what was answered; by default the workspace's",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> JudgeCheck:
        if (self.base_url is None) == (self.weights is None):
            raise ValueError("give either base_url or weights, exactly one of them")
        return self


Check = Annotated[
    SqlExecutionCheck
    | TextCheck
    | RegexCheck
    | RougeCheck
    | EmbeddingCheck
    | PythonCheck
    | JudgeCheck,
    Field(discriminator="kind"),
]
