"""What one attempt at a teacher brought: an answer, or why there is none.

Bodies of the chat-completions API (OpenAI API reference, "Create chat completion" and "Streaming")
are read here field by field, since a teacher may send anything.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.teacher.logprobs import Unreadable, compact

LARGEST_ANSWER_BYTES = 64 << 20
REFUSAL = "refusal"  # our finish_reason for a text that came in the field of that name
NO_LOGPROBS = "answer without log-probabilities"
UNREADABLE_LOGPROBS = "answer whose log-probabilities cannot be read"


@dataclass(frozen=True)
class Answer:
    """One answer, as far as the body told; token counts are 0 where it did not, and
    `top_logprobs` (as logprobs.py keeps them) None.

    Of one that was streamed, in seconds since it was asked for: `chunk_seconds` when each chunk
    with text came, `total_seconds` when its end did. `counted`: the server told
    `completion_tokens`, and else they are its chunks. `cached_tokens`: of the prompt's."""

    model: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    top_logprobs: list[Any] | None = None
    time_to_first_token: float | None = None
    chunk_seconds: tuple[float, ...] = ()
    total_seconds: float = 0.0
    counted: bool = False
    cached_tokens: int = 0


@dataclass(eq=False)
class Trouble(Exception):
    """Why one attempt gave no answer. `reason` is short and without IDs, so that it groups."""

    reason: str
    retry: bool = True
    status: int = 0
    code: str = ""
    pause: float | None = None
    reached: bool = True
    detail: str = ""

    @property
    def about_logprobs(self) -> bool:
        """Whether it is about the log-probabilities that were asked for, not the prompt."""
        refused = self.status in (400, 404, 422, 501) and "logprob" in self.detail.lower()
        return refused or self.reason in (NO_LOGPROBS, UNREADABLE_LOGPROBS)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait (RFC 9110, 10.2.3: seconds or a date; `retry-after-ms` is OpenAI's)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def chunks(arriving: Iterable[bytes], deadline: float) -> Iterator[bytes]:
    """The pieces of a body, until `deadline` (time.monotonic) or 64 MiB.

    Raises:
        Trouble: past either bound.
    """
    size = 0
    for chunk in arriving:
        size += len(chunk)
        if time.monotonic() > deadline:
            raise Trouble("no answer in time", detail="the answer was cut off while it came in")
        if size > LARGEST_ANSWER_BYTES:
            raise Trouble("answer that is too large")
        yield chunk


def parse_object(body: bytes) -> dict[str, Any]:
    """A body or event as a JSON object.

    Raises:
        Trouble: it is none, or it reports an error.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Trouble("answer that is not JSON", detail=str(error)) from error
    if not isinstance(value, dict):
        raise Trouble("answer that is not a JSON object")
    if value.get("error"):
        raise Trouble("error inside the answer", detail=str(value["error"])[:300])
    return value


def _choice(document: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = document.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def read_whole(document: Mapping[str, Any], logprobs: bool = False) -> Answer:
    """The first choice of a body that was not streamed; `logprobs`: they were asked for.

    Raises:
        Trouble: no choice, or one without text, or without the log-probabilities of its tokens
            where they were asked for.
    """
    choice = _choice(document)
    if choice is None:
        raise Trouble("answer without choices")
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, finish_reason = message.get("content"), str(choice.get("finish_reason") or "")
    if text is None:
        text, finish_reason = message.get("refusal"), REFUSAL
    if not isinstance(text, str):
        raise Trouble("answer without content")
    # A refusal's tokens are listed elsewhere, and nobody learns from it.
    top = _logprobs(choice, needed=logprobs and bool(text) and finish_reason != REFUSAL)
    return Answer(
        model=str(document.get("model") or ""),
        text=_clean(text),
        finish_reason=finish_reason,
        prompt_tokens=_usage(document, "prompt_tokens") or 0,
        completion_tokens=_usage(document, "completion_tokens") or 0,
        top_logprobs=top,
    )


def _logprobs(choice: Mapping[str, Any], needed: bool) -> list[Any] | None:
    try:
        found = compact(choice.get("logprobs"))
    except Unreadable as error:
        if needed:
            raise Trouble(UNREADABLE_LOGPROBS, retry=False) from error
        return None
    if needed and not found:
        detail = "logprobs: true was asked for, and the answer came without them"
        raise Trouble(NO_LOGPROBS, retry=False, detail=detail)
    return found


def _usage(document: Mapping[str, Any], name: str) -> int | None:
    usage = document.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


def _cached(document: Mapping[str, Any]) -> int | None:
    usage = document.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    value = details.get("cached_tokens") if isinstance(details, dict) else None
    return value if isinstance(value, int) else None


def _clean(text: str) -> str:
    """Half a surrogate pair is no text: no file could hold it."""
    return text.encode("utf-8", "replace").decode("utf-8")


class StreamReader:
    """Puts one answer together from server-sent events."""

    def __init__(self, started: float) -> None:
        self.done = False
        self._started = started
        self._came: list[float] = []
        self._ended = 0.0
        self._cached = 0
        self._pieces: list[str] = []
        self._finish_reason = ""
        self._events = 0
        self._model = ""
        self._usage: dict[str, int | None] = {}

    def read(self, line: bytes) -> None:
        """One line of the stream; comments (pings) and other fields are passed over."""
        if not line.startswith(b"data:"):
            return
        self._events += 1
        self._ended = time.monotonic() - self._started
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return
        document = parse_object(data)
        self._model = str(document.get("model") or self._model)
        for name in ("prompt_tokens", "completion_tokens"):
            self._usage[name] = _usage(document, name) or self._usage.get(name)
        self._cached = _cached(document) or self._cached
        choice = _choice(document)
        if choice is None:
            return
        delta = choice.get("delta")
        piece = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(piece, str) and piece:
            self._came.append(self._ended)
            self._pieces.append(piece)
        self._finish_reason = str(choice.get("finish_reason") or self._finish_reason)

    def answer(self) -> Answer:
        """Raises Trouble when the stream ended before its finish_reason."""
        if not self._events:
            detail = "bench times streamed answers, and this server sent none for stream: true"
            raise Trouble("answer that is not streamed", retry=False, detail=detail)
        if not self._finish_reason:
            raise Trouble("connection lost", detail="the stream ended early")
        return Answer(
            model=self._model,
            text=_clean("".join(self._pieces)),
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage.get("prompt_tokens") or 0,
            completion_tokens=self._usage.get("completion_tokens") or len(self._pieces),
            time_to_first_token=self._came[0] if self._came else None,
            chunk_seconds=tuple(self._came),
            total_seconds=self._ended,
            counted=self._usage.get("completion_tokens") is not None,
            cached_tokens=self._cached,
        )
