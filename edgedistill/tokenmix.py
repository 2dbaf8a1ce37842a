"""The token mix: the prompts that users really send, read from JSONL, one object a line.

Fields: `id`; `prompt` or `messages` ([{"role", "content"}, ...], the last one from the user);
optional `weight` (> 0; what its answer counts in training, such as how often it is sent), `tags`
(strings) and `reference` (a known good answer).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.errors import Problem, TokenMixError, listed

FIELDS = frozenset({"id", "prompt", "messages", "weight", "tags", "reference"})
ROLES = ("system", "user", "assistant")
MAX_WEIGHT = 1e9
PHRASING = "phrasing:"
OF_RECIPE = "`prompts` in the recipe names it, relative to the recipe's folder"


@dataclass(frozen=True)
class TokenMix:
    """The prompts in file order. `digest` is over their content, so spacing and key order in the
    file do not change it."""

    entries: tuple[TokenMixEntry, ...]
    digest: str


def read_token_mix(path: Path, sample: int | None = None, named_by: str = OF_RECIPE) -> TokenMix:
    """Read a token mix, or so many of its prompts; `named_by` says where its path was given.

    Raises:
        TokenMixError: missing, empty, not UTF-8, or broken lines; all of them, with line numbers.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenMixError(
            f"the prompts file cannot be read: {error.strerror}",
            where=str(path),
            hint=named_by,
        ) from error
    problems: list[Problem] = []
    entries: dict[str, TokenMixEntry] = {}
    first_line: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        entry, found = _read_line(line)
        if entry is not None and entry.id in entries:
            found = [("id", f"{entry.id!r} is already used in line {first_line[entry.id]}")]
        problems += [Problem(str(path), number, field, text) for field, text in found]
        if entry is not None and not found:
            entries[entry.id] = entry
            first_line[entry.id] = number
    if problems:
        raise _broken(path, problems)
    if not entries:
        raise TokenMixError("there is no prompt in this file", where=str(path), hint=_example())
    listed = _drawn(tuple(entries.values()), sample)
    return TokenMix(listed, digest_of([asdict(entry) for entry in listed]))


def _drawn(entries: tuple[TokenMixEntry, ...], count: int | None) -> tuple[TokenMixEntry, ...]:
    """So many of them, in their order; which, is decided by IDs alone, so that a larger sample
    holds a smaller one."""
    if count is None or count >= len(entries):
        return entries
    order = sorted(entries, key=lambda entry: hashlib.sha256(entry.id.encode()).digest())
    kept = {entry.id for entry in order[:count]}
    return tuple(entry for entry in entries if entry.id in kept)


def normalised(text: str) -> str:
    """Casefolded, without punctuation (Unicode categories P*), whitespace as single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(kept.split())


def same_prompt(said: Iterable[str]) -> str:
    """Equal for conversations that differ by case, space and punctuation only."""
    return normalised("\n".join(said))


def phrasing(entry: TokenMixEntry) -> str:
    """What groups prompts that are worded alike: X of the tag `phrasing:X`, or, without such a
    tag, the normalised prompt with every number as `#`."""
    for tag in entry.tags:
        if tag.startswith(PHRASING):
            return tag.removeprefix(PHRASING)
    return re.sub(r"\d+", "#", normalised(entry.prompt))


def _read_line(line: bytes) -> tuple[TokenMixEntry | None, list[tuple[str, str]]]:
    """The entry, or (field, what is wrong) for everything wrong in the line."""
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return None, [("", f"not UTF-8 (byte {error.start + 1} of the line)")]
    except UnicodeEncodeError:
        return None, [("", "holds half of a surrogate pair, which is no text")]
    except json.JSONDecodeError as error:
        return None, [("", f"not a JSON object: {error.msg} at character {error.pos + 1}")]
    except (ValueError, RecursionError) as error:
        return None, [("", f"not a JSON object: {error}")]
    if not isinstance(values, dict):
        return None, [("", f"must be a JSON object, not {type(values).__name__}")]
    problems = [*_unknown(values), *_wrong_id(values), *_wrong_text(values), *_wrong_rest(values)]
    return (None, problems) if problems else (_entry(values), [])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _unknown(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = ", ".join(sorted(FIELDS))
    return [(str(k), f"unknown key (known: {known})") for k in values if k not in FIELDS]


def _wrong_id(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "id" not in values:
        return [("id", "is required")]
    name = values["id"]
    return [] if isinstance(name, str) and name.strip() else [("id", "must be a non-empty string")]


def _wrong_text(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    if ("prompt" in values) == ("messages" in values):
        return [("prompt", "give either prompt or messages, exactly one of them")]
    if "prompt" in values:
        text = values["prompt"]
        fine = isinstance(text, str) and bool(text.strip())
        return [] if fine else [("prompt", "must be a non-empty string")]
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        return [("messages", "must be a non-empty list")]
    problems = [
        (f"messages[{index}]", f"must be {{'role': {' | '.join(ROLES)}, 'content': text}}")
        for index, message in enumerate(messages)
        if not _is_message(message)
    ]
    if not problems and messages[-1]["role"] != "user":
        return [("messages", "the last message must be the user's")]
    return problems


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
        and bool(message["content"].strip())
    )


def _wrong_rest(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    weight = values.get("weight", 1.0)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 < weight < MAX_WEIGHT
    ):
        problems.append(("weight", f"must be a number above 0 and below {MAX_WEIGHT:g}"))
    tags = values.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append(("tags", "must be a list of strings"))
    if not isinstance(values.get("reference"), str | None):
        problems.append(("reference", "must be a string"))
    return problems


def _entry(values: Mapping[str, Any]) -> TokenMixEntry:
    messages = values.get("messages") or [{"role": "user", "content": values["prompt"]}]
    return TokenMixEntry(
        id=values["id"],
        messages=tuple(messages),
        weight=float(values.get("weight", 1.0)),
        tags=tuple(values.get("tags", ())),
        reference=values.get("reference"),
    )


def _broken(path: Path, problems: list[Problem]) -> TokenMixError:
    count = len(problems)
    noun = "problem" if count == 1 else "problems"
    what = f"{count} {noun} in the token mix:{listed(problems)}"
    return TokenMixError(what, hint=_example(), problems=problems)


def _example() -> str:
    return 'one JSON object a line, such as {"id": "q1", "prompt": "How many tickets are open?"}'
