"""Talks to a teacher: anything that speaks the OpenAI chat-completions API.

Requests go through the openai SDK with its own retries off, so that every attempt is counted and
bounded here. Bodies are read by hand: the SDK builds its objects without validating them, and a
socket timeout alone never ends a server that keeps sending pings. No other module sees the SDK's
or the HTTP library's exceptions.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edgedistill.artifacts import digest_of
from edgedistill.errors import MissingTool, TeacherUnreachable
from edgedistill.teacher.answers import (
    Answer,
    StreamReader,
    Trouble,
    chunks,
    parse_object,
    read_whole,
    retry_after,
)
from edgedistill.teacher.refusals import TEACHER, Asked, Named, raise_if_hopeless, unreachable

if TYPE_CHECKING:
    import openai

LONGEST_PAUSE_SECONDS = 60.0
USAGE = {"stream_options": {"include_usage": True}}
RETRIED = frozenset({408, 409, 429})
REASONS = {408: "request timeout", 409: "conflict", 429: "rate limit"}


@dataclass(frozen=True)
class Endpoint:
    """Where a teacher answers. `key_env` names the variable the key came from, and `named` what
    its user set where, for errors."""

    base_url: str
    api_key: str = field(repr=False)
    key_env: str | None = None
    named: Named = TEACHER


@dataclass(frozen=True)
class Call:
    """One request. `weights` tells apart local teachers that go by one model ID."""

    prompt_id: str
    model: str
    messages: tuple[dict[str, str], ...]
    parameters: dict[str, Any]
    prompt_version: str
    purpose: str = "collect"
    weights: str | None = None

    @property
    def key(self) -> str:
        """sha256 (hex) of what shapes the answer; prompt ID and version are only names."""
        parts = [self.model, list(self.messages), self.parameters, self.purpose]
        return digest_of(parts if self.weights is None else [*parts, self.weights])


@dataclass(frozen=True)
class Trace:
    """One asked call with its provenance. Times in seconds; `failure` is None when answered.

    `trace_id` is made from the request, so that equal requests have equal IDs and nothing
    downstream depends on when they were asked. It travels in the header `X-Trace-Id`.
    `latency_seconds` and `time_to_first_token` are of the last attempt alone.
    """

    trace_id: str
    key: str
    prompt_id: str
    purpose: str
    model_asked: str
    model_answered: str
    prompt_version: str
    parameters: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    latency_seconds: float
    time_to_first_token: float | None
    text: str
    finish_reason: str
    top_logprobs: list[Any] | None
    attempts: int
    failure: str | None
    asked_at: str
    failure_detail: str = ""

    @property
    def why(self) -> str:
        """Why it failed, with what the server said; "" where it was answered."""
        return ": ".join(filter(None, (self.failure, self.failure_detail)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class TeacherClient:
    """Asks one endpoint; safe to use from many threads. A context manager.

    One attempt takes at most `timeout_seconds` to the first byte and is cut at the first byte
    after `timeout_seconds` in total; between attempts it waits `backoff_seconds`, doubling, with
    jitter, or what Retry-After says, in both cases 60 s at most.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        timeout_seconds: float = 120.0,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
    ) -> None:
        self.endpoint = endpoint
        self._timeout = timeout_seconds
        self._attempts = attempts
        self._backoff = backoff_seconds
        self._closed = threading.Event()
        self._answered = False
        self._stream_options: Mapping[str, Any] = USAGE
        self._sdk = _sdk(endpoint, timeout_seconds)

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self._sdk.close()

    def close(self) -> None:
        """Let attempts in flight end, and start no other: a waiting `ask` returns a failure."""
        self._closed.set()

    def ask(self, call: Call) -> Trace:
        """Ask for a whole answer.

        Returns a Trace also when the call failed for good (`failure` says why).

        Raises:
            TeacherUnreachable: no attempt got a connection.
            TeacherRefused: the key, the model ID or the quota was refused, so no call can work.
        """
        return self._ask(call, self._whole)

    def stream(self, call: Call) -> Trace:
        """Ask with streaming; fills `time_to_first_token` (first chunk with text).

        `completion_tokens` is the server's usage where it sends one in the last chunk, and else
        the number of chunks with text (llama-cpp-python sends one chunk a token and no usage).

        Raises: as `ask`.
        """
        return self._ask(call, self._streamed)

    def timed(self, call: Call) -> tuple[Trace, Answer | None]:
        """As `stream`, and the answer with when each part of it came; None when it failed."""
        kept: list[Answer] = []

        def attempt(call: Call, number: int) -> Answer:
            kept.append(self._streamed(call, number))
            return kept[-1]

        trace = self._ask(call, attempt)
        return trace, kept[-1] if kept else None

    def _ask(self, call: Call, attempt: Callable[[Call, int], Answer]) -> Trace:
        asked_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        troubles: list[Trouble] = []
        trace = _trace(call, asked_at)
        while len(troubles) < self._attempts:
            number, started = len(troubles) + 1, time.monotonic()
            try:
                answer = attempt(call, number)
            except Trouble as trouble:
                trace = _failed(trace, trouble, number, time.monotonic() - started)
                raise_if_hopeless(trouble, call.model, call.parameters, self._at())
                troubles.append(trouble)
                more = trouble.retry and number < self._attempts
                if not more or self._closed.wait(self._pause(trouble, number)):
                    break
            else:
                self._answered = True
                return _completed(trace, answer, number, time.monotonic() - started)
        if not any(trouble.reached for trouble in troubles) and not self._closed.is_set():
            raise unreachable(troubles[-1], self._attempts, self._at())
        return trace

    def _pause(self, trouble: Trouble, number: int) -> float:
        wait = trouble.pause
        if wait is None:
            wait = self._backoff * 2.0 ** (number - 1) * random.uniform(0.75, 1.25)
        return min(wait, LONGEST_PAUSE_SECONDS)

    def _request(self, call: Call, number: int, extra: Mapping[str, Any]) -> Any:
        return self._sdk.chat.completions.with_streaming_response.create(
            model=call.model,
            messages=list(call.messages),  # type: ignore[arg-type]
            extra_headers={"X-Trace-Id": _trace_id(call), "X-Attempt": str(number)},
            timeout=self._timeout,
            **call.parameters,
            **extra,
        )

    def _whole(self, call: Call, number: int) -> Answer:
        deadline = time.monotonic() + self._timeout
        with _translated(), self._request(call, number, {}) as response:
            body = b"".join(chunks(response.iter_bytes(), deadline))
        return read_whole(parse_object(body), bool(call.parameters.get("logprobs")))

    def _streamed(self, call: Call, number: int) -> Answer:
        try:
            return self._stream_with(call, number, self._stream_options)
        except Trouble as trouble:
            if trouble.status not in (400, 422) or not self._stream_options:
                raise
        # Some servers refuse the option; without it the chunks are counted. Asked for once only:
        # every refusal would count as time of the answer.
        answer = self._stream_with(call, number, {})
        self._stream_options = {}
        return answer

    def _stream_with(self, call: Call, number: int, options: Mapping[str, Any]) -> Answer:
        started = time.monotonic()
        reader, extra = StreamReader(started), {"stream": True, **options}
        with _translated(), self._request(call, number, extra) as response:
            pending = b""
            for chunk in chunks(response.iter_bytes(), started + self._timeout):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    reader.read(line)
                if reader.done:
                    break
        return reader.answer()

    def _at(self) -> Asked:
        end = self.endpoint
        return Asked(end.base_url, end.key_env, end.named, first=not self._answered)


def _sdk(endpoint: Endpoint, timeout: float) -> openai.OpenAI:
    try:
        import httpx2
        import openai
    except ImportError as error:
        what = f"the package {error.name} is not installed, and asking a teacher needs it"
        raise MissingTool(what, hint="in the checkout: pip install -e '.[collect]'") from error

    # A proxy from the environment must not get the calls that stay on this machine.
    http = openai.DefaultHttpxClient(
        trust_env=not is_loopback(endpoint.base_url), timeout=timeout, follow_redirects=True
    )
    try:
        return openai.OpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "none",
            max_retries=0,
            http_client=http,
        )
    except httpx2.InvalidURL as error:
        what = f"{endpoint.named.url} is not a URL: {error}"
        raise TeacherUnreachable(what, where=endpoint.base_url) from error


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine by its loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Foreign exceptions of one attempt become a Trouble."""
    import httpx2
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        raise _refusal(error) from error
    except openai.APIConnectionError as error:
        raise _disconnected(error.__cause__ or error) from error
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise _disconnected(error) from error
    except (openai.OpenAIError, ValueError) as error:
        raise Trouble("answer that cannot be read", detail=str(error)) from error


def _disconnected(error: BaseException) -> Trouble:
    import httpx2

    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return Trouble("no connection", reached=False, detail=str(error) or "timed out")
    if isinstance(error, httpx2.TimeoutException):
        return Trouble("no answer in time", detail=str(error))
    return Trouble("connection lost", detail=str(error))


def _refusal(error: openai.APIStatusError) -> Trouble:
    status = error.status_code
    code = str(getattr(error, "code", None) or "")
    known = code or REASONS.get(status) or ("server error" if status >= 500 else "refused")
    return Trouble(
        reason=f"HTTP {status} ({known})",
        retry=status in RETRIED or status >= 500,
        status=status,
        code=code,
        pause=retry_after(error.response.headers),
        detail=error.message[:300],
    )


def _trace_id(call: Call) -> str:
    return call.key[:32]


def _trace(call: Call, asked_at: str) -> Trace:
    return Trace(
        trace_id=_trace_id(call),
        key=call.key,
        prompt_id=call.prompt_id,
        purpose=call.purpose,
        model_asked=call.model,
        model_answered="",
        prompt_version=call.prompt_version,
        parameters=call.parameters,
        prompt_tokens=0,
        completion_tokens=0,
        latency_seconds=0.0,
        time_to_first_token=None,
        text="",
        finish_reason="",
        top_logprobs=None,
        attempts=0,
        failure=None,
        asked_at=asked_at,
    )


def _failed(trace: Trace, trouble: Trouble, attempts: int, seconds: float) -> Trace:
    return replace(
        trace,
        failure=trouble.reason,
        failure_detail=trouble.detail,
        attempts=attempts,
        latency_seconds=round(seconds, 6),
    )


def _completed(trace: Trace, answer: Answer, attempts: int, seconds: float) -> Trace:
    return replace(
        trace,
        model_answered=answer.model,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        latency_seconds=round(seconds, 6),
        time_to_first_token=answer.time_to_first_token,
        text=answer.text,
        finish_reason=answer.finish_reason,
        top_logprobs=answer.top_logprobs,
        attempts=attempts,
        failure=None,
        failure_detail="",
    )
