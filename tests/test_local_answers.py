"""What the local teacher's answers carry: log-probabilities without logits of the whole prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.runtime import LlamaCpp
from edgedistill.spelling import STOP, Said
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.teacher.client import Call, TeacherClient, Trace
from edgedistill.teacher.local_server import serve
from edgedistill.teacher.logprobs import read_said

ASKED = ({"role": "system", "content": "on"}, {"role": "user", "content": "the others"})
K = 5
# Most tokens of the tiny model are single bytes, and half of them are no character alone.
MAX_TOKENS = 24
ROUNDING = 0.02  # nats; it depends on how many tokens are evaluated at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[TeacherClient]:
    with (
        serve(model, "m", threads=1, context_tokens=256, port=None, start_seconds=60) as server,
        TeacherClient(server.endpoint, 60, 1, 1) as opened,
    ):
        yield opened


def ask(client: TeacherClient, max_tokens: int = MAX_TOKENS, **more: object) -> Trace:
    return client.ask(
        Call("p", "m", ASKED, {"temperature": 0.0, "max_tokens": max_tokens, **more}, "v")
    )


def test_the_answer_stays_as_it_is(client: TeacherClient) -> None:
    plain, told = ask(client), ask(client, logprobs=True, top_logprobs=K)
    assert told.text == plain.text
    assert (told.completion_tokens, told.finish_reason) == (
        plain.completion_tokens, plain.finish_reason
    )  # fmt: skip
    assert plain.top_logprobs is None
    assert ask(client, logprobs=True, top_logprobs=K).top_logprobs == told.top_logprobs


def test_log_probabilities_are_those_of_the_runtimes_logits(
    client: TeacherClient, model: Path, tmp_path: Path
) -> None:
    said = read_said(ask(client, logprobs=True, top_logprobs=K).top_logprobs or [])
    with LlamaCpp(model, threads=1, context_tokens=256) as runtime:
        said_before = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in ASKED)
        asked = runtime.tokenize(said_before + "<|im_start|>assistant\n")
        made = runtime.generate(asked, MAX_TOKENS, runtime.end_ids())
        ids = [*made.ids, tiny.STOP] if made.stopped else made.ids
        runtime.logits(asked + ids, len(asked), tmp_path / "logits")
    logits = np.fromfile(tmp_path / "logits", np.float32).reshape(len(ids), -1).astype(float)
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert len(said) == len(ids) > 5
    for token, index, row in zip(said, ids, wanted, strict=True):
        assert token.piece == spelled(index)
        assert token.logprob == pytest.approx(row[index], abs=ROUNDING)
        listed = sorted([token.logprob, *(logprob for _, logprob in token.others)], reverse=True)
        best = [i for i in np.argsort(-row)[:K] if spelled(i) is not None]
        assert listed == pytest.approx([row[i] for i in best], abs=ROUNDING)


def spelled(index: int) -> bytes | None:
    """Bytes of a tiny token; None for control tokens, but for those that end an answer."""
    if index < len(tiny.SPECIAL):
        return STOP if index in (0, tiny.STOP) else None
    made = ["".join(merge.split()).replace("Ġ", " ").encode() for merge in tiny.MERGES]
    return [bytes([byte]) for byte in range(256)][index - 3] if index < 259 else made[index - 259]


def test_bytes_that_are_no_text_are_kept(client: TeacherClient) -> None:
    trace = ask(client, logprobs=True, top_logprobs=20)
    pieces = [piece for token in trace.top_logprobs or [] for piece, _ in token[2]]
    assert any(isinstance(piece, list) for piece in pieces)
    assert None not in pieces


def test_no_alternatives(client: TeacherClient) -> None:
    said = read_said(ask(client, 3, logprobs=True, top_logprobs=0).top_logprobs or [])
    assert [token.others for token in said] == [()] * 3
    assert all(isinstance(token, Said) and token.logprob < 0 for token in said)
