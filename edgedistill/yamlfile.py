"""YAML as data: no includes, no dotted paths, and every problem reported with file, line and field.

`load` gives plain values; `parse` turns them into a frozen pydantic model, or collects problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from edgedistill.errors import ConfigError, Problem
from edgedistill.field_help import Location, unknown_field, unset

# The patterns that names must match, in words.
NAMES: Mapping[str, str] = {
    r"^[a-z0-9][a-z0-9-]*$": "lower-case letters, digits and -, which is not the first",
    r"^[A-Za-z0-9][A-Za-z0-9_]*$": "letters, digits and _, which is not the first",
}
Model = TypeVar("Model", bound=BaseModel)


class FieldError(ValueError):
    """Raised by a model's validator: what is wrong with one field, or a field within it."""

    def __init__(self, message: str, *field: str | int) -> None:
        super().__init__(message)
        self.field: Location = field


class FieldErrors(ValueError):
    """All of them at once, of one model."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)


def refuse(errors: Iterable[FieldError]) -> None:
    """Raise FieldErrors where there are any."""
    found = list(errors)
    if found:
        raise FieldErrors(found)


@dataclass(frozen=True)
class Document:
    """The values of one YAML file, and the line (from 1) where each field starts."""

    file: str
    values: Mapping[str, Any]
    lines: Mapping[Location, int]

    def line(self, location: Location) -> int:
        """Line of a field, or of the closest parent that is in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


def load(path: Path, shown: str | None = None) -> Document:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: missing, not YAML, a key given twice, or not a mapping.
    """
    file = shown or str(path)
    try:
        text = path.read_text("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError([Problem(file, 0, "", "there is no such file")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(file, 0, "", f"cannot be read: {error}")]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError([Problem(file, line, "", f"not valid YAML: {problem}")]) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(file, 1, "", "must be a mapping of fields to values")])
    lines: dict[Location, int] = {}
    twice = _walk(node, (), lines)
    if twice:
        raise ConfigError([Problem(file, ln, name, "is given twice") for name, ln in twice])
    return Document(file, values, lines)


def front_matter(text: str) -> Mapping[str, Any]:
    """The YAML between the first two lines of `---` of a Markdown file; {} where there is none that
    can be read."""
    first, *rest = text.split("\n---", 1) if text.startswith("---\n") else ("",)
    try:
        values = yaml.safe_load(first.removeprefix("---")) if rest else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _walk(node: yaml.Node, at: Location, lines: dict[Location, int]) -> list[tuple[str, int]]:
    twice: list[tuple[str, int]] = []
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:  # what is below it was given twice for that reason
                twice.append((dotted(here), key.start_mark.line + 1))
                continue
            lines[here] = key.start_mark.line + 1
            twice += _walk(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            twice += _walk(value, (*at, index), lines)
    return twice


def parse(model: type[Model], document: Document) -> tuple[Model | None, list[Problem]]:
    """Validate a document: the model, or every problem in it."""
    try:
        return model.model_validate(document.values), []
    except ValidationError as error:
        return None, [each for item in error.errors() for each in _problems(model, document, item)]


def _problems(model: type[BaseModel], document: Document, item: Any) -> Iterator[Problem]:
    location: Location = tuple(
        part for part in item["loc"] if not _is_union_tag(document, item["loc"], part)
    )
    raised = item.get("ctx", {}).get("error")
    errors = raised.errors if isinstance(raised, FieldErrors) else [raised]
    told = [error for error in errors if isinstance(error, FieldError)]
    for error in told:
        place = (*location, *error.field)
        yield Problem(document.file, document.line(place), dotted(place), str(error))
    if not told:
        yield _problem(model, document, item, location)


def _problem(model: type[BaseModel], document: Document, item: Any, location: Location) -> Problem:
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = unknown_field(model, document.values, location)
    elif item["type"] != "value_error" and (told := unset(model, document.values, location, item)):
        message = told
    elif item["type"] == "union_tag_invalid":
        context = item["ctx"]
        location = (*location, context["discriminator"].strip("'"))
        allowed, given = context["expected_tags"], context["tag"]
        message = f"{given!r} is none of {allowed}"
        if given == "None":
            message = f"is empty; give one of {allowed}"
    elif item["type"] == "missing":
        message = "is required"
    elif location[-1:] == ("api_key_env",):
        message = "must be the name of an environment variable, never the key itself"
    elif item["type"] not in ("value_error", "union_tag_not_found"):
        message = f"{_in_words(item)} (got {item['input']!r})"
    return Problem(document.file, document.line(location), dotted(location), message)


def _in_words(item: Any) -> str:
    """pydantic's sentence, or one without Python's words where it has some."""
    told: Mapping[str, str] = {
        "tuple_type": "must be a list: [a, b]",
        "list_type": "must be a list: [a, b]",
        "dict_type": "must be a mapping of fields to values",
        "model_type": "must be a mapping of fields to values",
        "model_attributes_type": "must be a mapping of fields to values",
        "too_short": "must not be empty",
        "string_pattern_mismatch": _allowed(item.get("ctx", {}).get("pattern", "")),
    }
    return told.get(item["type"], item["msg"])


def _allowed(pattern: str) -> str:
    words = NAMES.get(pattern)
    return f"must match the pattern {pattern}" if words is None else f"may have {words}"


def _is_union_tag(document: Document, location: Location, part: str | int) -> bool:
    """pydantic puts the tag of a chosen variant into the location; the file has no such field."""
    position = location.index(part)
    holder: Any = document.values
    for step in location[:position]:
        in_list = isinstance(holder, list) and isinstance(step, int) and step < len(holder)
        if in_list or (isinstance(holder, Mapping) and step in holder):
            holder = holder[step]
    return isinstance(holder, Mapping) and part not in holder and part in holder.values()


def dotted(location: Location) -> str:
    """`("lora", "rank")` as `lora.rank`, list positions as `[2]`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text
