"""Each sitting of `edgedistill bench MODEL` in one line, so that a figure is seen over months.

    edgedistill history tg128

The store is `history.jsonl` in the workspace. A line is written at once and to the end of the file,
so two sittings may end together; a line that a crash has torn is left out and counted. It holds the
git commit of the user's repository where the workspace lies in one.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import digest_of, storing
from edgedistill.commit import SHORT, commit_of
from edgedistill.differences import value_of
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.fail_if import figures_like, wrapped
from edgedistill.figures import FIGURES, SHARES
from edgedistill.result_file import Result

STORE = "history.jsonl"
NEEDED = ("made", "model", "sha256", "device", "fingerprint", "busy", "mix", "figures")
LATER = ("settings", "runtime", "check")  # which lines of earlier versions lack
WITHOUT_PROMPTS = ("tg128", "pp512", "load", "bytes")
ASKED = ("asked", "system", "prompt", "prompt_version", "temperature")  # how prompts are asked
DEFAULT = "tg128"
TICKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Point:
    """One sitting's figure; `low` and `high` are where another sitting's is expected. `commit` is
    the short hash of what the user's repository was at, with "+" where something was changed since;
    "" where the workspace lies in none."""

    made: str  # UTC, ISO 8601
    sha256: str  # "" of a server
    value: float
    low: float | None
    high: float | None
    busy: bool
    commit: str = ""


@dataclass(frozen=True)
class Series:
    """A figure over time, oldest first, of models of one name on devices of one kind, and of equal
    settings, as far as the figure hangs on them: what hangs on the prompts of the same prompts
    (`mix` is the start of their digest, else ""), a share of the same check. None is also what a
    line of an earlier version does not tell. `apart` says in words what of these differs from other
    series of the model and device."""

    model: str
    device: str
    fingerprint: str
    mix: str
    points: list[Point]
    threads: int | None = None
    runtime: str | None = None  # its name
    check: str | None = None  # its kind and the start of its digest
    max_tokens: int | None = None
    asked: str | None = None  # the start of a digest of the system message, and what else of ASKED
    apart: str = ""


@dataclass(frozen=True)
class History:
    """`torn`: how many lines of the store could not be read. `commits`, by commit: all of them in
    order, and `outside`, how many sittings are left out as they have none; else None and 0."""

    figure: str
    unit: str
    series: list[Series]
    torn: int
    store: str
    commits: list[str] | None = None
    outside: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def remember(result: Result, workspace: Path) -> None:
    """Append a result to the workspace's history.

    Raises:
        StorageError: it cannot be written.
    """
    figures = {name: found for name in FIGURES if (found := value_of(result, name)) is not None}
    address = result.device["address"]
    device, fingerprint = result.device["cpu"], result.device["fingerprint"]
    if device is None:  # of a server the address is all that is known
        device = fingerprint = address
    elif address != "local":  # other kernels and another clock than those of a sitting there
        device, fingerprint = f"{device} ({address})", f"{fingerprint} {address}"
    at = commit_of(workspace)
    line = {
        "made": result.made,
        "model": result.model["name"],
        "sha256": result.model["sha256"],
        "device": device,
        "fingerprint": fingerprint,
        "busy": bool(result.load["busy"]),
        "mix": None if result.token_mix is None else result.token_mix["digest"],
        "settings": {
            **{name: result.settings.get(name) for name in ("threads", "max_tokens")},
            "asked": digest_of({name: result.settings.get(name) for name in ASKED}),
        },
        "runtime": result.device.get("runtime"),
        "check": _check(result),
        "commit": None if at is None else asdict(at),
        "figures": figures,
    }
    _append(workspace / STORE, json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _check(result: Result) -> dict[str, str] | None:
    """What tells it from another: it may have a whole rubric in it."""
    if result.check is None:
        return None
    return {"kind": result.check["kind"], "digest": digest_of(dict(result.check))}


def _append(file: Path, line: bytes) -> None:
    """In one write to the end, so that two at once do not mix. A last line that was torn is ended
    first: only that one is lost."""
    with storing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+", buffering=0) as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)
            os.fsync(stream.fileno())


def read_history(
    workspace: Path, figure: str = DEFAULT, *, by_commit: bool = False, may_lack: bool = False
) -> History:
    """One figure over all sittings, or over those that know their commit.

    Raises:
        UsageError: there is no such figure, or no sitting yet, or none with a commit, or, unless
            it `may_lack`, none with this figure.
        ArtifactError: the store cannot be read.
    """
    name, store = _known(figure), workspace / STORE
    if not store.is_file():
        raise UsageError(
            "no sitting is remembered here", where=str(store),
            hint="`edgedistill bench MODEL` remembers each; --workspace names another folder",
        )  # fmt: skip
    try:
        text = store.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ArtifactError(f"it cannot be read: {error.strerror}", where=str(store)) from error
    lines = [line for line in text.split("\n") if line.strip()]
    known = [line for line in map(_line, lines) if line is not None]
    torn, unit = len(lines) - len(known), FIGURES[name].unit
    if not may_lack:
        _require_figure(name, known, store)
    if not by_commit:
        return History(name, unit, _series(name, known), torn, str(store))
    placed = [line for line in known if line.get("commit")]
    if not placed:
        raise UsageError(
            "no sitting that is remembered here knows its commit", where=str(store),
            hint="a sitting has one where the workspace lies in a git repository",
        )  # fmt: skip
    commits, outside = _commits(placed), len(known) - len(placed)
    return History(name, unit, _series(name, placed), torn, str(store), commits, outside)


def _require_figure(name: str, lines: Sequence[Mapping[str, Any]], store: Path) -> None:
    held = [each for each in FIGURES if any(line["figures"].get(each) for line in lines)]
    if lines and name not in held:
        raise UsageError(
            f"no sitting here knows {name}", where=str(store),
            hint=wrapped(f"known: {', '.join(held)}"),
        )  # fmt: skip


def _commits(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The oldest first, by when they were committed, or where that is not known first measured;
    what was changed behind one is next to it."""
    first: dict[str, tuple[datetime.datetime, bool]] = {}
    for line in sorted(lines, key=lambda line: str(line["made"])):
        at = datetime.datetime.fromisoformat(line["commit"]["committed"] or line["made"])
        first.setdefault(_shown(line), (at, bool(line["commit"]["dirty"])))
    return sorted(first, key=lambda name: first[name])


def _shown(line: Mapping[str, Any]) -> str:
    at = line.get("commit")
    return f"{at['hash'][:SHORT]}{'+' if at['dirty'] else ''}" if at else ""


def _known(figure: str) -> str:
    name = figure.replace(".", "_")
    if name not in FIGURES:
        raise UsageError(f"{figure!r} is no figure", hint=figures_like(name))
    return name


def _require_zone(time: str) -> None:
    """Times with and without a zone have no order."""
    if datetime.datetime.fromisoformat(time).tzinfo is None:
        raise ValueError("a time without its zone")


def _line(text: str) -> dict[str, Any] | None:
    """What one line holds, or None where it is torn or of another kind."""
    try:
        value = json.loads(text)
        _require_zone(value["made"])
        if value.get("commit") is not None:
            _ = value["commit"]["hash"][:SHORT], value["commit"]["dirty"]
            _require_zone(value["commit"]["committed"] or value["made"])
        if value.get("check") is not None:
            _ = value["check"]["kind"], value["check"]["digest"][:SHORT]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    whole = all(name in value for name in NEEDED) and isinstance(value["figures"], dict)
    told = all(isinstance(value.get(name) or {}, dict) for name in LATER)
    return value if whole and told else None


def _series(name: str, lines: Iterable[Mapping[str, Any]]) -> list[Series]:
    found: dict[tuple[str, ...], Series] = {}
    for line in sorted(lines, key=lambda line: str(line["made"])):
        figure = line["figures"].get(name)
        if not isinstance(figure, dict) or not isinstance(figure.get("value"), int | float):
            continue
        model, device, machine = (str(line[k]) for k in ("model", "device", "fingerprint"))
        facts = _facts(name, line)
        key = (model, machine, *map(str, facts.values()))
        found.setdefault(key, Series(model, device, machine, points=[], **facts)).points.append(
            Point(
                str(line["made"]), str(line["sha256"] or ""), figure["value"],
                figure.get("low"), figure.get("high"), bool(line["busy"]), _shown(line),
            )
        )  # fmt: skip
    every = list(found.values())
    return [replace(each, apart=_apart(each, every)) for each in every]


def _facts(name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a sitting its figure hangs on: threads move no answer, and a check no time."""
    settings, runtime, check = (line.get(part) or {} for part in LATER)
    mix = "" if name in WITHOUT_PROMPTS else str(line["mix"] or "")[:12]
    judged_by = f"{check['kind']} {check['digest'][:6]}" if check and name in SHARES else None
    return {
        "mix": mix,
        "threads": settings.get("threads") if FIGURES[name].of_device else None,
        "runtime": None if name == "bytes" else runtime.get("name"),
        "check": judged_by,
        "max_tokens": settings.get("max_tokens") if mix else None,
        "asked": str(settings["asked"])[:6] if mix and settings.get("asked") else None,
    }


def _apart(one: Series, every: Iterable[Series]) -> str:
    alike = [each for each in every if (each.model, each.device) == (one.model, one.device)]
    told = {
        "mix": f"mix {one.mix[:6]}",
        "threads": f"{one.threads} thread{'' if one.threads == 1 else 's'}",
        "runtime": f"{one.runtime}",
        "check": f"check {one.check}",
        "max_tokens": f"max_tokens {one.max_tokens}",
        "asked": f"asked as {one.asked}",
    }
    differ = [fact for fact in told if len({str(getattr(each, fact)) for each in alike}) > 1]
    return ", ".join(told[fact] for fact in differ if getattr(one, fact) not in (None, ""))


def sparkline(values: Iterable[float]) -> str:
    """From the least to the largest of them; all alike are in the middle."""
    held = list(values)
    least, span = min(held), max(held) - min(held)
    if span == 0:
        return TICKS[len(TICKS) // 2] * len(held)
    return "".join(TICKS[round((value - least) / span * (len(TICKS) - 1))] for value in held)
