"""`edgedistill init`: a new recipe folder in which every field carries its description.

The text is written from the recipe's own model, so it cannot fall behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedistill.artifacts import write_atomic
from edgedistill.check_specs import TextCheck
from edgedistill.errors import UsageError
from edgedistill.library import shipped_root
from edgedistill.recipe import ApiTeacher, Recipe

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
MODEL_ID = "the-model-id"  # to be replaced: validate and doctor say so
UNTOUCHED = ("is still the template's", "write the model ID that your endpoint knows")
STUDENT = "smollm2-135m-instruct-q4_1"
# What a new recipe says where the model has no default, or where the default teaches less.
VALUES: Mapping[str, Any] = {
    "description": "Says whether a customer's message is urgent.",
    "prompts": "prompts.jsonl",
    "teacher": {
        "kind": "api",
        "base_url": "http://127.0.0.1:8000/v1",
        "api_key_env": "TEACHER_API_KEY",
        "model": MODEL_ID,
        "licence": "the licence or terms of its answers",
        "system": "Answer with one word: urgent or normal.",
        "sampling": {"max_tokens": 8},
    },
    "check": {"kind": "label", "labels": ["urgent", "normal"]},
    "student": {"weights": STUDENT, "max_tokens": 8},
    "gates": {"merged_agreement": 0.85},
}
# A field of several variants is written as the one that VALUES shows.
VARIANTS: Mapping[str, type[BaseModel]] = {"teacher": ApiTeacher, "check": TextCheck}
HEAD = """\
# A recipe: what to distil. Fields behind a # are optional; all others are written out.
# Check it: edgedistill validate --recipe {asked} --target laptop
# Build it: edgedistill build --recipe {asked} --target laptop
# Other teachers: `kind: local` with `weights: file.gguf` (relative to this folder) or the name of
# pinned weights is served on this machine, and needs no base_url or key.
# Other checks: exact, label, json, number, sql-execution (with `database: file.db`), regex (with
# `pattern`), rouge, embedding (with `model: folder`), python (with `file: check.py`),
# judge (with `base_url` and `model`).
"""
PROMPTS = (
    ("p-001", "The whole shop is down and we are losing orders!", "outage"),
    ("p-002", "could you tell me how to change my avatar", "how-to"),
    ("p-003", "I was charged twice, please fix it today", "billing"),
    ("p-004", "just saying thanks, great support", "thanks"),
)
READ_ME = """\
# {name}

`recipe.yaml` says what to distil, `prompts.jsonl` holds the prompts, one JSON object a line:
`id` and `prompt` (or `messages`, a conversation that ends with the user's turn), and if you like
`tags`, `reference` (a known good answer) and `weight` (what its answer counts in training). A tag
`phrasing:NAME` marks prompts that are worded the same way, so that the report can tell seen from
unseen wording.

The four prompts here only show the form. Use the ones your users really send: a few hundred in
many different wordings.
"""


def initialise(name: str, folder: Path) -> Path:
    """Make `folder/name/` with recipe.yaml, prompts.jsonl and README.md; returns recipe.yaml.

    Raises:
        UsageError: the name cannot be one, or the folder or a shipped recipe of it is there.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a recipe's name", hint="use lower-case letters, digits and -"
        )
    home, shipped = folder / name, shipped_root() / "recipes"
    if (shipped / name).is_dir() and folder.name == "recipes" and folder.resolve() != shipped:
        raise UsageError(
            f"'{name}' is a recipe that ships with edgedistill, and yours would hide it",
            hint="take another name",
        )
    if home.exists():
        raise UsageError(
            "there is something already, and it was left as it is",
            where=str(home),
            hint="edit its recipe.yaml, or take another name",
        )
    prompts = "".join(
        json.dumps({"id": key, "prompt": text, "tags": [f"phrasing:{tag}"]}) + "\n"
        for key, text, tag in PROMPTS
    )
    write_atomic(home / "README.md", READ_ME.format(name=name).encode())
    write_atomic(home / "prompts.jsonl", prompts.encode())
    place = home.as_posix()  # by its name alone it is found in recipes/ only
    asked = name if folder == Path("recipes") else place if "/" in place else f"./{place}"
    write_atomic(home / "recipe.yaml", recipe_text(name, asked).encode())
    return home / "recipe.yaml"


def recipe_text(name: str, asked: str | None = None) -> str:
    """The commented YAML of a new recipe; `asked` is how commands find it, if not by its name."""
    return (
        HEAD.format(asked=asked or name)
        + "\n".join(_lines(Recipe, {"name": name, **VALUES}, 0))
        + "\n"
    )


def _lines(model: type[BaseModel], values: Mapping[str, Any], depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in _kind_first(model):
        section = _section(name, field)
        if section is not None:
            yield ("" if depth else "\n") + f"{pad}{name}:  # {_first_line(section)}"
            yield from _lines(section, values.get(name, {}), depth + 1)
        elif (optional := _optional_section(field)) is not None:
            yield f"{pad}# {name}:  # {_first_line(optional)}"
            inside = _lines(optional, {}, 0)
            yield from (f"{pad}#   {line.strip(chr(10))}" for line in inside)
        elif name in values:
            yield _commented(f"{pad}{name}: {_yaml(values[name])}", field)
        elif field.is_required():  # within an optional section
            yield _commented(f"{pad}{name}:", field)
        elif field.default is None:
            yield _commented(f"{pad}# {name}:", field)
        else:
            yield _commented(f"{pad}{name}: {_yaml(_default(field))}", field)


def _kind_first(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    # A subclass lists the fields of its base first; a reader wants the variant's name on top.
    return sorted(model.model_fields.items(), key=lambda item: item[0] not in ("name", "kind"))


def _section(name: str, field: FieldInfo) -> type[BaseModel] | None:
    if name in VARIANTS:
        return VARIANTS[name]
    held = field.annotation
    return held if isinstance(held, type) and issubclass(held, BaseModel) else None


def _optional_section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type)]
    held = (kind for kind in kinds if issubclass(kind, BaseModel))
    return next(held, None) if type(None) in kinds else None


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _yaml(value: Any) -> str:
    """One YAML value on one line. JSON is YAML, but for 1e-06: YAML 1.1 reads that as text."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    bare = isinstance(value, float) and "e" in text and "." not in text
    return text.replace("e", ".0e") if bare else text


def _commented(text: str, field: FieldInfo) -> str:
    variants = get_args(field.annotation) if field.annotation is not None else ()
    words = [str(item) for item in variants if isinstance(item, str)]
    notes = [field.description] if field.description else []
    notes += [f"one of {', '.join(words)}"] if len(words) > 1 else []
    return f"{text}  # {'; '.join(notes)}" if notes else text


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]
