"""What differs between compared results beside their models, and may be what figures tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.differences import device_of
from edgedistill.result_file import Result
from edgedistill.result_set import Named

KERNELS = "kernels"
LONGEST = 60  # characters of a setting


def settings_apart(named: Sequence[Named]) -> list[str]:
    """Notes on settings that differ between all that answer the same prompts, and between results
    of one device."""
    asked = {each.name: each.result for each in named if each.result.token_mix is not None}
    notes = _differing({name: _of_answers(result) for name, result in asked.items()})
    for device in dict.fromkeys(device_of(each.result) for each in named):
        here = [each for each in named if device_of(each.result) == device]
        notes += _differing({each.name: _of_device(each.result) for each in here})
    return notes


def _differing(told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on settings by row name; what a result does not tell differs from none."""
    notes = []
    for name in dict.fromkeys(name for settings in told.values() for name in settings):
        values = {row: str(each[name]) for row, each in told.items() if name in each}
        if len(set(values.values())) > 1:
            if name == KERNELS:
                values = _not_of_all(values)
            listed = ", ".join(f"{row}: {_short(value)}" for row, value in values.items())
            notes.append(f"{name} differs ({listed})")
    return notes


def _short(value: str) -> str:
    """In one line of a note: a system message may be a page."""
    line = " ".join(value.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}... ({len(value)} characters)"


def _not_of_all(values: Mapping[str, str]) -> dict[str, str]:
    """Of lists of names by row, those that another row lacks."""
    common = set.intersection(*(set(value.split()) for value in values.values()))
    apart = {row: [n for n in value.split() if n not in common] for row, value in values.items()}
    return {row: " ".join(names) or "without" for row, names in apart.items()}


def _of_answers(result: Result) -> dict[str, Any]:
    names = {"max_tokens": "max_tokens", "system": "system message"}
    return {label: result.settings[n] for n, label in names.items() if n in result.settings}


def _of_device(result: Result) -> dict[str, Any]:
    before = result.conditions.get("before") or {}
    runtime = dict(result.device.get("runtime") or {})
    kernels = runtime.pop("kernels", None)
    told = {
        "threads": result.settings.get("threads"),
        "power source": before.get("power"),
        "throttled": result.conditions.get("throttled"),
        "runtime": " ".join(str(value) for value in runtime.values()),
        KERNELS: kernels,
    }
    return {name: value for name, value in told.items() if value is not None}
