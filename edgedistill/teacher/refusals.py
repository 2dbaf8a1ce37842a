"""What an endpoint's refusals mean for every further call, in the words its user knows it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import TeacherRefused, TeacherUnreachable
from edgedistill.teacher.answers import Trouble

NO_LOGPROBS_HINT = (
    "take teacher.sampling.top_logprobs out of the recipe (a distil method that needs them cannot "
    "be used then), lower it, or choose a teacher that gives them"
)


@dataclass(frozen=True)
class Named:
    """What an endpoint is, and where its URL, its model ID and the variable of its key are set."""

    who: str = "the teacher"
    url: str = "teacher.base_url"
    model: str = "teacher.model"
    key: str = "teacher.api_key_env"


TEACHER = Named()  # as a recipe has it


@dataclass(frozen=True)
class Asked:
    """Where a call went; `key_env` is the variable its key came from, `first` that nothing has
    been answered there yet."""

    where: str
    key_env: str | None
    named: Named
    first: bool


def raise_if_hopeless(
    trouble: Trouble, model: str, parameters: Mapping[str, Any], at: Asked
) -> None:
    """Some refusals hold for every call; later 403 and 404 may be about one prompt only.

    Raises:
        TeacherRefused: the key, the model ID or the quota was refused, or log-probabilities.
    """
    named, where, first = at.named, at.where, at.first
    key = f"the key in {at.key_env}" if at.key_env else f"the key ({named.key} names it)"
    if trouble.status == 401 or (trouble.status == 403 and first):
        what = f"{named.who} refused the key (HTTP {trouble.status}): {trouble.detail}"
        raise TeacherRefused(what, where=where, hint=f"check {key}")
    if trouble.status == 402 or trouble.code == "insufficient_quota":
        what = f"{named.who}'s account has no quota left: {trouble.detail}"
        raise TeacherRefused(what, where=where, hint=f"top up the account of {key}")
    if trouble.status == 404 and first:
        what = f"{named.who} does not know model {model!r} (HTTP 404): {trouble.detail}"
        hint = f"check {named.model}, and that {named.url} ends where the API starts (/v1)"
        raise TeacherRefused(what, where=where, hint=hint)
    if first and parameters.get("logprobs") and trouble.about_logprobs:
        what = f"{named.who} gives no log-probabilities: {trouble.detail or trouble.reason}"
        raise TeacherRefused(what, where=where, hint=NO_LOGPROBS_HINT)


def unreachable(trouble: Trouble, attempts: int, at: Asked) -> TeacherUnreachable:
    """No attempt got a connection."""
    tries = f"{attempts} attempt{'s' if attempts != 1 else ''}"
    kept = "" if at.first else " Answers so far are kept"
    return TeacherUnreachable(
        f"no connection to {at.named.who} in {tries}: {trouble.detail}",
        where=at.where,
        hint=f"is it running, and is {at.named.url} right?{kept}",
    )
