"""How the local teacher's child makes an answer: alike whatever was asked before, in one thread,
its tokens counted, and its log-probabilities where they are asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BATCH_TOKENS = 512
# How the text after the last message's control token is evaluated: at once when it is short, and
# else in blocks, so that a long start which prompts share there can be reused too.
SHORT_TEXT_TOKENS = 64
BLOCK_TOKENS = 16
# Plain text between control tokens that is shorter than this is a role, such as "assistant".
ROLE_TOKENS = 5
BUNDLE_SECONDS = 0.04  # text of a streamed answer is sent this often: 25 times a second
PIECE_BYTES = 64  # most tokens are shorter


class Recorder:
    """Writes down the log-probabilities of the answer that is being made, as the API has them.

    llama-cpp-python's own need the logits of every token of the prompt, too (`logits_all`). Here
    each token's are read when it has been chosen: the raw logits, before the temperature, in
    float32. The end of the answer is a token without text; other control tokens are left out.
    """

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self._asked: int | None = None
        self._entries: list[dict[str, Any]] = []
        self._pieces: dict[int, bytes | None] = {}

    def begin(self, asked: int | None) -> None:
        """An answer whose tokens get so many alternatives; None: it is not written down."""
        self._asked, self._entries = asked, []

    def end(self) -> dict[str, Any]:
        """`logprobs` of the answer's choice."""
        return {"content": self._entries, "refusal": None}

    def chosen(self, token: int) -> None:
        """The token that was just chosen from the logits that were computed last."""
        if self._asked is None or self._piece(token) is None:
            return
        model, context = self._llama._model, self._llama._ctx
        logits = np.ctypeslib.as_array(context.get_logits_ith(-1), shape=(model.n_vocab(),))
        highest = logits.max()
        total = highest + np.log(np.exp(logits - highest).sum(dtype=np.float64))
        count = min(self._asked, len(logits))
        best = np.argpartition(logits, -count)[-count:] if count else np.empty(0, int)
        best = best[np.argsort(-logits[best], kind="stable")]
        listed = [
            self._entry(int(i), logits[i] - total) for i in best if self._piece(int(i)) is not None
        ]
        self._entries.append({**self._entry(token, logits[token] - total), "top_logprobs": listed})

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token) or b""
        text = piece.decode("utf-8", "replace")
        return {"token": text, "bytes": list(piece), "logprob": float(logprob)}

    def _piece(self, token: int) -> bytes | None:
        """The bytes a token writes; none for one that ends the answer, None for other control."""
        if token not in self._pieces:
            self._pieces[token] = _piece(self._llama._model.vocab, token)
        return self._pieces[token]


def _piece(vocab: Any, token: int) -> bytes | None:
    import ctypes

    import llama_cpp

    if llama_cpp.llama_vocab_is_eog(vocab, token):
        return b""
    size = PIECE_BYTES
    while True:
        buffer = ctypes.create_string_buffer(size)
        written = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if written >= 0:
            return buffer.raw[:written] or None
        size = -written


@dataclass
class Usage:
    """Tokens of the answer that is being made; its stop token does not count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


def answer_alike(llama: Any, recorder: Recorder) -> Usage:
    """Make an answer independent of the calls before it, and still reuse a cached prompt start.

    Rounding depends on how many tokens are evaluated at once, so a start that is cached up to
    wherever two prompts differ moves the logits (measured on a 1.5B model: by up to 0.5). Here
    the batches of a prompt are a function of its tokens alone, and whole batches are reused:
    every token is evaluated in the same company as without a cache, which gives the same bits.

    Returns what counts the tokens: a streamed chunk is a whole character, and that can be several.
    """
    import llama_cpp

    generate, vocab = llama.generate, llama._model.vocab
    before: list[int] = []
    usage = Usage()

    def alike(tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        nonlocal before
        control = [llama_cpp.llama_vocab_is_control(vocab, token) for token in tokens]
        ends = batch_ends(control)
        cached = llama.input_ids[: llama.n_tokens].tolist()
        start = reusable(cached, before, list(tokens), ends)
        before = ends
        if start == 0:
            llama.reset()
        llama.n_tokens = start
        for end in ends[:-1]:
            if end > start:
                llama.eval(tokens[start:end])
                start = end
        usage.prompt_tokens, usage.completion_tokens = len(tokens), 0
        for token in generate(tokens, *args, **kwargs):
            usage.completion_tokens += not llama_cpp.llama_vocab_is_eog(vocab, token)
            recorder.chosen(token)
            yield token

    llama.generate = alike
    return usage


def compute_in(engine: Executor, llama: Any, usage: Usage, recorder: Recorder) -> None:
    """Let `engine` make every chat answer from prompt to text, whichever thread asks for it."""
    from llama_cpp.llama_chat_format import get_chat_completion_handler

    name = llama.chat_format
    handle: Any = llama._chat_handlers.get(name) or get_chat_completion_handler(name)

    def answer(request: dict[str, Any]) -> Any:
        # A streamed answer with log-probabilities is refused by the handler.
        recorded = bool(request.get("logprobs")) and not request["stream"]
        recorder.begin((request.get("top_logprobs") or 0) if recorded else None)
        if not recorded:
            return handle(**request)
        made = handle(**{**request, "logprobs": None, "top_logprobs": None})
        made["choices"][0]["logprobs"] = recorder.end()
        return made

    def elsewhere(**request: Any) -> Any:
        made = engine.submit(answer, request).result()
        return bundles(engine, made, usage) if request["stream"] else made

    llama.chat_handler = elsewhere


def bundles(
    engine: Executor, chunks: Iterator[Any], usage: Usage, seconds: float = BUNDLE_SECONDS
) -> Iterator[Any]:
    """The chunks of a streamed answer, the first with text at once, later ones put together.

    A chunk costs Python, here and at the reader, on the cores that decode.
    """
    wait = 0.0
    while whole := engine.submit(bundle, chunks, wait).result():
        choice = whole["choices"][0]
        wait = seconds if wait or choice["delta"].get("content") else 0.0
        if choice["finish_reason"]:
            total = usage.prompt_tokens + usage.completion_tokens
            whole["usage"] = {**asdict(usage), "total_tokens": total}
        yield whole


def bundle(chunks: Iterator[Any], seconds: float) -> dict[str, Any] | None:
    """One chunk for all that come within `seconds`, or until the answer ends; None: no more."""
    deadline, pieces = time.monotonic() + seconds, []
    for chunk in chunks:
        choice = chunk["choices"][0]
        if text := choice["delta"].get("content"):
            pieces.append(text)
        if choice["finish_reason"] or time.monotonic() >= deadline:
            if pieces:
                choice["delta"]["content"] = "".join(pieces)
            return dict(chunk)
    return None


def batch_ends(control: Sequence[bool]) -> list[int]:
    """Where the batches of a prompt end, given which of its tokens are control tokens.

    One batch ends where the last message's text starts: what comes before is what prompts share.
    """
    count = len(control)
    marks = [position for position, is_control in enumerate(control) if is_control]
    starts, stops = [0, *(mark + 1 for mark in marks)], [*marks, count]
    texts = [a for a, b in zip(starts, stops, strict=True) if b - a >= ROLE_TOKENS]
    text = texts[-1] if texts else 0
    step = BLOCK_TOKENS if count - text > SHORT_TEXT_TOKENS else SHORT_TEXT_TOKENS
    inside = [*range(BATCH_TOKENS, text, BATCH_TOKENS), text, *range(text + step, count, step)]
    return [*filter(None, inside), count]


def reusable(
    cached: Sequence[int], before: Sequence[int], tokens: Sequence[int], ends: Sequence[int]
) -> int:
    """How many tokens of a prompt are cached from equal batches; its last batch never counts."""
    kept = 0
    for old, new in zip(before, ends[:-1], strict=False):
        if old != new or new > len(cached) or cached[kept:new] != tokens[kept:new]:
            break
        kept = new
    return kept
