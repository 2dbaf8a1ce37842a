"""What to say of a field that its model does not have, and of one that was left empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedistill.errors import did_you_mean

Location = tuple[str | int, ...]
SURE = 0.8  # how near a name must be to one here, where another place has it exactly
SHORT = 80  # characters of a description that fit into an error
# pydantic's error types, and what is expected then.
EXPECTED: Mapping[str, str] = {
    "string_type": "a text",
    "int_type": "a number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list: [a, b]",
    "path_type": "a path",
}


def unknown_field(model: type[BaseModel], values: Mapping[str, Any], at: Location) -> str:
    """What to do about the field at `at` of a document that should be a `model`."""
    *inside, last = at
    name, kind = str(last), _value(values, (*inside, "kind"))
    holders = list(_models_at(model, values, tuple(inside)))
    here = [holder for holder in holders if _is_of(holder, kind)] or holders
    if any(name in holder.model_fields for holder in holders):
        return f"is not for kind {kind}; remove it"
    known = sorted({field for holder in here for field in holder.model_fields})
    places = [place for place in _places(model, values, "") if place.split(".")[-1] == name]
    said = [did_you_mean(name, known, SURE if places else 0.5)] if known else []
    if places:
        said.append(f"it belongs {_either(sorted(dict.fromkeys(places), key=_depth))}")
    told = " Otherwise ".join(each for each in said if each)
    return f"unknown field; {told or 'misspelt, or of another version?'}"


def unset(model: type[BaseModel], values: Mapping[str, Any], at: Location, item: Any) -> str:
    """What to say where a field is empty or `none`, and may not be; "" where it is neither."""
    given = item["input"]
    is_none = isinstance(given, str) and given.strip().lower() == "none"
    field = _field(model, values, at) if given is None or is_none else None
    if field is None:
        return ""
    optional = not field.is_required()
    if is_none:
        return "leave it out instead of none" if optional and field.default is None else ""
    allowed = str(item.get("ctx", {}).get("expected", ""))
    is_section = any(True for _ in _models(field.annotation))
    form = "its fields" if is_section else EXPECTED.get(item["type"], allowed or "a value")
    is_short = field.description and len(field.description) <= SHORT
    meant = f" ({field.description})" if is_short else ""
    return f"is empty; give {form}{meant}{', or leave it out' if optional else ''}"


def _depth(place: str) -> int:
    return place.count(".")


def _either(places: Sequence[str]) -> str:
    at = [f"at {place}" if _depth(place) else "at the top, beside name" for place in places]
    return " or ".join((", ".join(at[:-1]), at[-1])) if len(at) > 1 else at[0]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field may hold, those in a list included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _models_at(
    model: type[BaseModel], values: Mapping[str, Any], at: Location
) -> Iterator[type[BaseModel]]:
    """Every variant of what is at a place."""
    holders = [model]
    for depth, part in enumerate(at):
        if isinstance(part, int):
            continue
        kind = _value(values, (*at[:depth], "kind"))
        holders = [
            inner
            for holder in holders
            if _is_of(holder, kind) and part in holder.model_fields
            for inner in _models(holder.model_fields[part].annotation)
        ]
    yield from holders


def _field(model: type[BaseModel], values: Mapping[str, Any], at: Location) -> FieldInfo | None:
    if not at or isinstance(at[-1], int):
        return None
    holders = _models_at(model, values, at[:-1])
    kind = _value(values, (*at[:-1], "kind"))
    found = (holder.model_fields.get(at[-1]) for holder in holders if _is_of(holder, kind))
    return next((field for field in found if field is not None), None)


def _is_of(model: type[BaseModel], kind: Any) -> bool:
    """Whether a variant is the one that a file's `kind` asks for; one without kinds always is."""
    field = model.model_fields.get("kind")
    return field is None or kind is None or kind in get_args(field.annotation)


def _value(values: Any, at: Location) -> Any:
    for part in at:
        inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not inside and not (isinstance(values, Mapping) and part in values):
            return None
        values = values[part]
    return values


def _places(model: type[BaseModel], values: Any, at: str) -> Iterator[str]:
    """Dotted names of all fields, below the variants that the file chose."""
    for name, field in model.model_fields.items():
        place, inside = f"{at}.{name}" if at else name, _value(values, (name,))
        yield place
        for inner in _models(field.annotation):
            if _is_of(inner, _value(inside, ("kind",))):
                yield from _places(inner, inside, place)
