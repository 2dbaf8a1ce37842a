"""The teacher: a black box behind the OpenAI chat-completions API, remote or on loopback.

Everything downstream sees an `Endpoint` (base URL and key) and `Call`s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill import machine
from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.errors import TeacherRefused, WeightsError
from edgedistill.progress import Progress
from edgedistill.recipe import ApiTeacher, LocalTeacher, Sampling, Teacher
from edgedistill.teacher.client import Call, Endpoint, TeacherClient, Trace, is_loopback
from edgedistill.teacher.refusals import TEACHER, Named
from edgedistill.teacher.traces import TraceStore
from edgedistill.weights.cache import cache_folder, digest

if TYPE_CHECKING:
    from edgedistill.teacher.local_server import Server

COLLECT = "collect"  # the purpose of a call whose answer is learnt from
TOP_LOGPROBS = "top_logprobs"

__all__ = [
    "TEACHER",
    "Call",
    "Endpoint",
    "Named",
    "TeacherClient",
    "Trace",
    "TraceStore",
    "call_for",
    "is_loopback",
    "key_from",
    "open_endpoint",
    "prompt_version",
    "serve_teacher",
    "weights_identity",
]


@contextlib.contextmanager
def open_endpoint(
    teacher: Teacher, progress: Progress, named: Named = TEACHER
) -> Iterator[Endpoint]:
    """Where to ask the teacher. A local one is started, and stopped on the way out. `named` is who
    that is: a judge is asked in the same way.

    Raises:
        TeacherRefused: the variable with the key is not set, or holds no key.
        TeacherError: the pinned port is in use.
        WeightsError, RuntimeFailure: a local teacher's file cannot be had or loaded.
    """
    if isinstance(teacher, ApiTeacher):
        who = named.who.removeprefix("the ")
        progress.note(f"{who}: {teacher.model} at {teacher.base_url} ({_source(named)})")
        key = key_from(teacher.api_key_env, teacher.base_url, named)
        yield Endpoint(teacher.base_url, key, teacher.api_key_env, named)
        return
    with serve_teacher(teacher, progress, named) as server:
        yield server.endpoint


@contextlib.contextmanager
def serve_teacher(
    teacher: LocalTeacher, progress: Progress, named: Named = TEACHER
) -> Iterator[Server]:
    """A local teacher's server while it is needed; raises as `open_endpoint`."""
    # The server module is imported here, since the child runs it as its main module.
    from edgedistill.teacher import local_server
    from edgedistill.weights import locate

    model = locate(teacher.weights, progress)
    threads = teacher.threads or machine.threads()
    source = "recipe" if teacher.threads else "physical cores"
    with contextlib.ExitStack() as stack:
        with progress.task(f"starting {named.who} {teacher.model}", None):
            server = stack.enter_context(
                local_server.serve(
                    model.path,
                    teacher.model,
                    threads=threads,
                    context_tokens=teacher.context_tokens,
                    port=teacher.port,
                    start_seconds=teacher.start_seconds,
                )
            )
        progress.note(
            f"{named.who.removeprefix('the ')}: {teacher.model} at {server.endpoint.base_url}, "
            f"{threads} threads ({source}), ready after {server.start_seconds:.1f} s"
        )
        yield server


def _source(named: Named) -> str:
    """Where its URL is set: in the recipe, or by an option."""
    return named.url if named.url.startswith("--") else f"recipe: {named.url}"


def key_from(name: str | None, base_url: str, named: Named = TEACHER) -> str:
    """The key that the environment variable `name` holds; "" for no variable.

    Raises:
        TeacherRefused: it is not set, or holds no key.
    """
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    problem = "holds characters that no HTTP header can carry" if key else "is not set"
    raise TeacherRefused(
        f"the environment variable {name} {problem}",
        where=base_url,
        hint=f"put {named.who}'s API key in {name} ({named.key} names it)",
    )


def call_for(entry: TokenMixEntry, teacher: Teacher, purpose: str = COLLECT) -> Call:
    """The request for one prompt. An entry's own system message stands instead of the teacher's.

    Log-probabilities are asked for by collect alone: an answer that is timed must not pay for them.

    Raises:
        WeightsError: the teacher is a GGUF path and there is no such file.
    """
    messages = tuple(dict(message) for message in entry.messages)
    if teacher.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": teacher.system}, *messages)
    return Call(
        prompt_id=entry.id,
        model=teacher.model,
        messages=messages,
        parameters=_parameters(teacher.sampling, purpose),
        prompt_version=prompt_version(teacher),
        purpose=purpose,
        weights=weights_identity(teacher),
    )


def _parameters(sampling: Sampling, purpose: str) -> dict[str, Any]:
    values = sampling.model_dump(mode="json", exclude={TOP_LOGPROBS}, exclude_none=True)
    if sampling.top_logprobs is None or purpose != COLLECT:
        return values
    return {**values, "logprobs": True, TOP_LOGPROBS: sampling.top_logprobs}


def prompt_version(teacher: Teacher) -> str:
    """The recipe's name for the teacher's prompt, or a short sha256 of it and the sampling."""
    if teacher.prompt_version is not None:
        return teacher.prompt_version
    sampling = teacher.sampling.model_dump(mode="json", exclude={TOP_LOGPROBS})
    return digest_of([teacher.system, sampling])[:12]


def weights_identity(teacher: Teacher) -> str | None:
    """What a local teacher runs: a pinned name, or the sha256 of a GGUF file. None for an API,
    which only its model ID identifies.

    Raises:
        WeightsError: there is no such file.
    """
    if isinstance(teacher, ApiTeacher):
        return None
    if not teacher.weights.lower().endswith(".gguf"):
        return teacher.weights
    try:
        return digest(Path(teacher.weights), cache_folder())
    except OSError as error:
        raise WeightsError(
            f"the teacher's weights cannot be read: {error.strerror}",
            where=teacher.weights,
            hint="teacher.weights in the recipe names a pinned file or a GGUF path",
        ) from error
