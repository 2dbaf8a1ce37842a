"""Fields of a recipe that say where a server of the chat-completions API is, and by which key."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from edgedistill.yamlfile import FieldError

ANSWERS_END = "/chat/completions"
NO_SECRETS = "a URL with a user, a password or a query would be in the result for all to read"


def holds_secret(url: str) -> bool:
    """Whether it has a part that may be one, and is kept in results otherwise.

    Raises:
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    return parts.username is not None or bool(parts.password or parts.query or parts.fragment)


def _without_path(url: str) -> str:
    if url.rstrip("/").endswith(ANSWERS_END):
        raise ValueError(f"leave {ANSWERS_END} out: the client adds it")
    return url


def _without_secret(url: str) -> str:
    if holds_secret(url):
        raise ValueError(NO_SECRETS)
    return url


def _names_one(name: str) -> str:
    if name.lower() == "none":
        raise FieldError("leave it out for no key")
    return name


BaseUrl = Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_without_path)]
OpenBaseUrl = Annotated[BaseUrl, AfterValidator(_without_secret)]  # one that results tell
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_names_one)]
