"""Lay results of `edgedistill bench MODEL --out FILE` side by side: what is better beyond its
interval, what changed against a baseline, and which conditions of a CI hold.

    edgedistill compare a.json b.json --baseline a.json --fail-if "tg128 < 0.97 * baseline"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.bundle_result import is_bundle
from edgedistill.comparison_text import in_one_unit
from edgedistill.differences import (
    ALIKE,
    BETTER,
    UNTOLD,
    Difference,
    device_of,
    difference,
    value_of,
)
from edgedistill.errors import UsageError
from edgedistill.fail_if import Condition, read_condition
from edgedistill.figures import FIGURES
from edgedistill.history import History, read_history
from edgedistill.paired import LEVEL
from edgedistill.result_file import Result
from edgedistill.result_set import Named, read_noted, require_comparable, unmatched
from edgedistill.settings_apart import settings_apart

BUSY = "no measure of the machine: other work disturbed it"
UNHEARD = "whether other work disturbed its device is not known"
ALONE = "there is nothing to hold against the baseline but itself"
COURSES = ("tg128", "agreement")


@dataclass(frozen=True)
class Row:
    """One result. `figures`, by name: value, low, high and unit. `best`: the figures in which it is
    better than every other, beyond the intervals. `against`: by figure, against the baseline;
    empty for that itself, and where there is none. `chain`: the fidelity chain of its bundle, see
    bundle_result; `on_chain`: whether its agreement is over the prompts of that chain;
    `from_bundle`: what its build measured."""

    name: str
    file: str
    model: str
    sha256: str | None  # None, as the fingerprint, of a server
    device: str
    fingerprint: str | None
    threads: int | None
    made: str
    busy: bool
    figures: dict[str, dict[str, Any]]
    best: list[str]
    against: dict[str, Difference]
    chain: list[dict[str, Any]] | None = None
    on_chain: bool = False
    from_bundle: bool = False


@dataclass(frozen=True)
class Judged:
    """A condition for one result. `holds` is None where that cannot be told; `said` says why."""

    condition: str
    result: str
    holds: bool | None
    said: str


@dataclass(frozen=True)
class Compared:
    """`baseline` is a row's name, or None. Without prompts `token_mix` and `check` are None."""

    rows: list[Row]
    baseline: str | None
    token_mix: dict[str, Any] | None
    check: dict[str, Any] | None
    judged: list[Judged]
    ignore_intervals: bool
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    named: Sequence[Named],
    baseline: Named | None = None,
    fail_if: Sequence[str] = (),
    *,
    ignore_intervals: bool = False,
    notes: Sequence[str] = (),
) -> Compared:
    """Compare results; `baseline` is one of them, and `notes` is what else there is to say.

    Raises:
        ArtifactError: they cannot be compared. UsageError: a condition cannot be read, or asks for
            a baseline where none is given.
    """
    conditions = [_condition(text, baseline) for text in fail_if]
    require_comparable(named)
    rows = [_row(each, named, baseline) for each in named]
    judged = [
        judge(condition, each, baseline, ignore_intervals=ignore_intervals)
        for condition in conditions
        for each in named
        if each is not baseline
    ]
    if conditions and not judged:
        raise UsageError(ALONE)
    asked = next((each.result for each in named if each.result.token_mix is not None), None)
    return Compared(
        rows=rows,
        baseline=None if baseline is None else baseline.name,
        token_mix=None if asked is None or asked.token_mix is None else dict(asked.token_mix),
        check=None if asked is None or asked.check is None else dict(asked.check),
        judged=judged,
        ignore_intervals=ignore_intervals,
        notes=[*notes, *_busy(named), *unmatched(named), *settings_apart(named)],
    )


def read_for_comparison(
    paths: Sequence[Path], baseline: Path | None
) -> tuple[list[Named], Named | None, list[str]]:
    """The results, the baseline first and only once; the baseline among them; and notes on what
    was given twice or left out.

    Raises:
        ArtifactError: as read_all. UsageError: the baseline is not one file, or stands alone.
    """
    if baseline is None:
        named, notes = read_noted(paths)
        return named, None, notes
    if baseline.is_dir() and not is_bundle(baseline):
        raise UsageError(
            "--baseline takes one result file or bundle, not a folder of them", where=str(baseline)
        )
    named, notes = read_noted(paths, baseline)
    if len(named) == 1:
        raise UsageError(ALONE, hint="give the results that are held against it, too")
    return named, named[0], notes


def _condition(text: str, baseline: Named | None) -> Condition:
    found = read_condition(text)
    if found.factor is not None and baseline is None:
        raise UsageError(f"--fail-if {text!r} needs --baseline FILE")
    return found


def _row(ours: Named, named: Sequence[Named], baseline: Named | None) -> Row:
    result = ours.result
    figures = {name: found for name in FIGURES if (found := value_of(result, name)) is not None}
    against = {}
    if baseline is not None and ours is not baseline:
        found = {name: difference(name, result, baseline.result) for name in figures}
        against = {name: each for name, each in found.items() if each is not None}
    bundle = result.model.get("bundle") or {}
    dataset = bundle.get("dataset")
    return Row(
        name=ours.name,
        file=str(ours.file),
        model=result.model["name"],
        sha256=result.model["sha256"],
        device=_device(result),
        fingerprint=result.device["fingerprint"],
        threads=result.settings.get("threads"),
        made=result.made,
        busy=bool(result.load["busy"]),
        figures=figures,
        best=[name for name in figures if _is_best(name, ours, named)],
        against=against,
        chain=bundle.get("chain"),
        from_bundle=ours.file.is_dir(),
        on_chain=dataset is not None and dataset == (result.token_mix or {}).get("dataset"),
    )


def _device(result: Result) -> str:
    """In words: its processor, and where it is when that is elsewhere."""
    cpu, address = result.device["cpu"], str(result.device["address"])
    if cpu is None:
        return address
    return str(cpu) if address == "local" else f"{cpu} ({address})"


def _is_best(name: str, ours: Named, named: Sequence[Named]) -> bool:
    """Whether `ours` beats each of the others. Of a device only what was measured on the same one
    undisturbed takes part; of a model every result of another file. A disturbed result is never
    the best."""
    if ours.result.load["busy"]:
        return False
    rivals = [each.result for each in named if each is not ours]
    if FIGURES[name].of_device:
        here = device_of(ours.result)
        rivals = [r for r in rivals if device_of(r) == here and not r.load["busy"]]
    else:
        own = ours.result.model["sha256"]  # a server tells none
        rivals = [r for r in rivals if own is None or r.model["sha256"] != own]
    rivals = [rival for rival in rivals if value_of(rival, name) is not None]
    return bool(rivals) and all(_beats(name, ours.result, rival) for rival in rivals)


def _beats(name: str, ours: Result, rival: Result) -> bool:
    found = difference(name, ours, rival)
    return found is not None and found.verdict == BETTER


def judge(
    condition: Condition, ours: Named, baseline: Named | None, *, ignore_intervals: bool = False
) -> Judged:
    """Whether a condition holds for a result: for the figures as measured (of turns: for the
    baseline's times their ratio), and, unless `ignore_intervals`, beyond the intervals
    (docs/compare.md)."""
    found = value_of(ours.result, condition.figure)
    if found is None:
        return _untold(condition, ours, f"{ours.name} has no {condition.figure}")
    if condition.factor is None or baseline is None:
        return _against_number(condition, ours, found, ignore_intervals)
    base = value_of(baseline.result, condition.figure)
    apart = difference(condition.figure, ours.result, baseline.result)
    if base is None or apart is None:
        return _untold(condition, ours, f"the baseline has no {condition.figure}")
    elsewhere = device_of(ours.result) != device_of(baseline.result)
    own = FIGURES[condition.figure].of_device
    if (own and elsewhere) or (apart.verdict == UNTOLD and not ignore_intervals):
        return _untold(condition, ours, apart.why)
    value, how = found["value"], ""
    if apart.in_turn and apart.value is not None:
        value, how = base["value"] * apart.value, f", {apart.value:.3f} of it turn by turn"
    measured = holds = condition.holds(value, base["value"])
    if holds and not ignore_intervals:
        holds = _beyond(condition, apart, base["value"])
    bound = condition.bound(base["value"])
    figures = (found["value"], base["value"], bound)
    own_text, base_text, bound_text = in_one_unit(figures, FIGURES[condition.figure].unit)
    said = f"{own_text} against the baseline's {base_text}{how} (bound {bound_text})"
    if measured and not holds:
        said += f"; {_noise(condition, apart, base['value'])}"
    return Judged(condition.text, ours.name, holds, said)


def _noise(condition: Condition, apart: Difference, base: float) -> str:
    """Why what is measured as beyond a bound does not count as that."""
    if apart.kind == "ratio":
        why = f"the interval of the ratio, {apart.low:.3f} to {apart.high:.3f},"
    elif _by_mcnemar(condition, apart, base):
        why = f"McNemar's test with p {apart.p_value:.2g} (it counts below {LEVEL:g})"
    else:
        why = f"the interval of the difference, {apart.low:+.1%} to {apart.high:+.1%},"
    return f"beyond the bound as measured, but {why} does not tell it from noise"


def _beyond(condition: Condition, apart: Difference, base: float) -> bool:
    """Whether the difference is told from none, or its interval lies beyond the bound, where that
    asks for more than the baseline has."""
    assert apart.low is not None
    assert apart.high is not None
    if _by_mcnemar(condition, apart, base):
        return apart.verdict != ALIKE
    excluded = _excluded(condition, apart, base)
    return apart.high < excluded if condition.wants_less else apart.low > excluded


def _by_mcnemar(condition: Condition, apart: Difference, base: float) -> bool:
    """Whether answers need only differ: of that McNemar's test is the exact one."""
    return apart.kind == "difference" and _excluded(condition, apart, base) == 0


def _excluded(condition: Condition, apart: Difference, base: float) -> float:
    """What an interval may not hold: no difference, or the bound."""
    ratio = apart.kind == "ratio"
    same = 1.0 if ratio else 0.0
    bound = condition.bound(base) / base if ratio else condition.bound(base) - base
    return max(bound, same) if condition.wants_less else min(bound, same)


def _against_number(
    condition: Condition, ours: Named, found: dict[str, Any], ignore_intervals: bool
) -> Judged:
    disturbed = ours.result.load["busy"] and FIGURES[condition.figure].of_device
    if disturbed and not ignore_intervals:
        return _untold(condition, ours, BUSY)
    measured = holds = condition.holds(found["value"], 0.0)
    nearest = found["high"] if condition.wants_less else found["low"]
    if holds and not ignore_intervals:
        if nearest is None:
            return _untold(condition, ours, "its interval is unknown: measured in one process")
        holds = condition.holds(nearest, 0.0)
    figures = (found["value"], condition.offset)
    own_text, bound_text = in_one_unit(figures, FIGURES[condition.figure].unit)
    said = f"{own_text} (bound {bound_text})"
    if measured and not holds:
        (end,) = in_one_unit([nearest], FIGURES[condition.figure].unit)
        said += f"; beyond the bound as measured, but its interval reaches {end}"
    return Judged(condition.text, ours.name, holds, said)


def _untold(condition: Condition, ours: Named, why: str) -> Judged:
    return Judged(condition.text, ours.name, None, why)


def _busy(named: Sequence[Named]) -> list[str]:
    said = {}
    for each in named:
        if each.result.load["busy"]:
            said[each.name] = BUSY
        elif each.file.is_dir():
            said[each.name] = each.result.notes[0]
        elif each.result.load["busy"] is None:
            said[each.name] = UNHEARD
    return [f"{name}: {what}" for name, what in said.items()]


def distributions(named: Sequence[Named]) -> dict[str, dict[str, list[float]]]:
    """By row name, by kind of time, the seconds of all processes as they came."""
    return {
        each.name: {
            kind: [value for group in found.groups for value in group]
            for kind in ("end_to_end", "inter_token")
            if (found := each.result.figures.get(f"{kind}_p50")) is not None
        }
        for each in named
    }


def courses(compared: Compared, workspace: Path) -> list[History]:
    """How the compared models did in the sittings that a workspace remembers: each figure that a
    condition names, else decode and agreement; by commit where all sittings know theirs.

    Raises:
        UsageError: nothing is remembered there. ArtifactError: the store cannot be read.
    """
    asked = [read_condition(each.condition).figure for each in compared.judged]
    models, found = {row.model for row in compared.rows}, []
    for figure in dict.fromkeys(asked or COURSES):
        whole = read_history(workspace, figure, may_lack=True)
        series = [each for each in whole.series if each.model in models]
        if all(point.commit for each in series for point in each.points) and series:
            ordered = read_history(workspace, figure, by_commit=True)
            series = [each for each in ordered.series if each.model in models]
            used = {point.commit for each in series for point in each.points}
            whole = replace(ordered, commits=[c for c in ordered.commits or [] if c in used])
        if series:
            found.append(replace(whole, series=series))
    return found
