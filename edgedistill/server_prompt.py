"""How a server is asked: anything that speaks the OpenAI chat-completions API, by URL and model ID.

The counterpart of model_prompt.py, which does the same for a model file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.endpoint_fields import ANSWERS_END, NO_SECRETS, holds_secret
from edgedistill.errors import UsageError
from edgedistill.fidelity import EvalRow
from edgedistill.recipe import ApiTeacher, Recipe, Sampling, StudentSpec
from edgedistill.teacher import (
    Call,
    Endpoint,
    Named,
    call_for,
    is_loopback,
    key_from,
    prompt_version,
)

SCHEMES = ("http://", "https://")
SERVER = Named(who="the server", url="the URL", model="--model", key="--api-key-env")
PURPOSE = "bench"
TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class AskedServer:
    """A server, the model there, and how it is asked: `teacher` holds its model ID, system message,
    sampling and prompt version, `template` the user message with {prompt} in it. `way` says whose
    way that is."""

    endpoint: Endpoint
    teacher: ApiTeacher
    template: str
    way: str

    @property
    def here(self) -> bool:
        """Whether it is reached by this machine's loopback address."""
        return is_loopback(self.endpoint.base_url)

    def call(self, row: EvalRow) -> Call:
        """The request for one prompt; its trace ID is made from all that shapes the answer."""
        # str.replace, not str.format: braces in the user's text are the user's.
        text = self.template.replace("{prompt}", row.prompt)
        messages = (*row.history, {"role": "user", "content": text})
        return call_for(TokenMixEntry(row.id, messages), self.teacher, PURPOSE)


def is_url(text: str) -> bool:
    """Whether what is measured is named by a URL."""
    return text.lower().startswith(SCHEMES)


def asked_server(
    url: str,
    model: str,
    key_env: str | None,
    recipe: Recipe | None = None,
    asked_as: str = TEACHER,
    system: str | None = None,
    max_tokens: int | None = None,
) -> AskedServer:
    """The server at `url`. It is asked as the recipe's teacher or student is, but for `system` and
    `max_tokens` where they are given; without a recipe greedily, for 128 tokens.

    Raises:
        UsageError: the URL cannot be used. TeacherRefused: `key_env` is not set, or holds no key.
    """
    require_url(url)
    endpoint = Endpoint(url, key_from(key_env, url, SERVER), key_env, SERVER)
    told = _told(recipe, asked_as)
    changes: dict[str, Any] = {} if system is None else {"system": system}
    if max_tokens is not None:
        sampling = told["sampling"].model_copy(update={"max_tokens": max_tokens})
        changes["sampling"] = sampling
    template = told.pop("template")
    if changes:
        told = {**told, **changes, "prompt_version": None}
    teacher = ApiTeacher(kind="api", base_url=url, model=model, licence="-", **told)
    if teacher.prompt_version is None:
        named = prompt_version(teacher)
        named = named if template == "{prompt}" else digest_of([named, template])[:12]
        teacher = teacher.model_copy(update={"prompt_version": named})
    way = "as given" if recipe is None else f"as the {asked_as} of {recipe.name}"
    return AskedServer(endpoint, teacher, template, way)


def _told(recipe: Recipe | None, asked_as: str) -> dict[str, Any]:
    if recipe is not None and asked_as == TEACHER:
        teacher = recipe.teacher
        return {
            "system": teacher.system,
            "sampling": teacher.sampling,
            "prompt_version": prompt_version(teacher),
            "template": "{prompt}",
        }
    student = StudentSpec(weights="-") if recipe is None else recipe.student
    return {
        "system": student.system,
        "sampling": Sampling(max_tokens=student.max_tokens),
        "template": student.prompt,
    }


def require_url(url: str) -> None:
    """Only what a base URL can be, and no secret: results are shown to others.

    Raises:
        UsageError: it cannot be used, for the reason told.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"this is no URL: {error}", where=url) from error
    if not host:
        raise UsageError("this URL names no host", where=url, hint="write https://HOST/v1")
    if holds_secret(url):
        raise UsageError(
            NO_SECRETS,
            where=f"{parts.scheme}://{host}",
            hint="give the key by --api-key-env NAME, and the URL without it",
        )
    if parts.path.rstrip("/").endswith(ANSWERS_END):
        hint = f"give it as {url.rstrip('/').removesuffix(ANSWERS_END)}"
        raise UsageError(f"{ANSWERS_END} is put behind the URL", where=url, hint=hint)


def settings_of(asked: AskedServer) -> Mapping[str, Any]:
    """How it is asked, as a result has it."""
    sampling = asked.teacher.sampling
    return {
        "asked": asked.way,
        "system": asked.teacher.system,
        "prompt": asked.template,
        "prompt_version": asked.teacher.prompt_version,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }
