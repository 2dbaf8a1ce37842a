"""Shares on parts of the prompts: by tag, by the prompt's length, and by that of the teacher's
answer; and which parts are unlike the rest beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgedistill.bench.agreement import bootstrap
from edgedistill.paired import LEVEL, holm

LEAST = 10  # prompts in a slice that is judged; tags with fewer are folded into one
RESAMPLES = 2000
TAG, PROMPT, ANSWER = "tag", "prompt length", "teacher's answer length"
OTHER = "other tags"
SHARES = {"agreement": "same", "gold": "gold"}  # figure: its flag in a row


@dataclass(frozen=True)
class Slice:
    """Some of the prompts: `by` one of TAG, PROMPT and ANSWER, and the IDs of its prompts."""

    by: str
    name: str
    ids: frozenset[str]


def sliced(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Each slice of a likeness's rows, with `n` and, for agreement and gold, its share with the
    bootstrap interval, that of the rest, and the p value of the difference: Fisher's exact test,
    Holm's correction over all slices of that figure. `differs`: below, above or None. A slice of
    less than LEAST prompts is `few`, and is not judged."""
    slices = slices_of(rows)
    found: list[dict[str, Any]] = [
        {"by": each.by, "name": each.name, "n": len(each.ids), "few": len(each.ids) < LEAST}
        for each in slices
    ]
    for figure, flag in SHARES.items():
        flags = {row["id"]: row[flag] for row in rows if flag in row}
        told = [_told(each, flags, seed) for each in slices]
        judged = [i for i, each in enumerate(told) if each and each["p_value"] is not None]
        adjusted = holm([told[i]["p_value"] for i in judged])  # type: ignore[index]
        for at, p_value in zip(judged, adjusted, strict=True):
            one = told[at]
            assert one is not None
            less = one["value"] < one["rest"]
            one["p_value"] = p_value
            one["differs"] = ("below" if less else "above") if p_value < LEVEL else None
        for each, one in zip(found, told, strict=True):
            each[figure] = one
    return found


def _told(one: Slice, flags: Mapping[str, bool], seed: int) -> dict[str, Any] | None:
    """Its share and the rest's; without a verdict where either has too few prompts."""
    inside = [flag for name, flag in flags.items() if name in one.ids]
    outside = [flag for name, flag in flags.items() if name not in one.ids]
    if not inside:
        return None
    judged = min(len(inside), len(outside)) >= LEAST
    return {
        **asdict(bootstrap(inside, RESAMPLES, seed)),
        "rest": sum(outside) / len(outside) if outside else None,
        "p_value": fisher(inside, outside) if judged else None,
        "differs": None,
    }


def slices_of(rows: Sequence[Mapping[str, Any]]) -> list[Slice]:
    """By tag, and by thirds of the two lengths, in characters. Of tags that hold the same prompts
    the first stands for all; one that all prompts have says nothing."""
    found = [*_by_tag(rows)]
    found += _thirds(PROMPT, {row["id"]: len(row["prompt"]) for row in rows if "prompt" in row})
    lengths = {row["id"]: len(row["teacher"]) for row in rows if row.get("teacher")}
    return [*found, *_thirds(ANSWER, lengths)]


def _by_tag(rows: Sequence[Mapping[str, Any]]) -> Iterable[Slice]:
    held: dict[str, set[str]] = {}
    for row in rows:
        for tag in row.get("tags", ()):
            held.setdefault(tag, set()).add(row["id"])
    large = {tag: ids for tag, ids in held.items() if LEAST <= len(ids) < len(rows)}
    names: dict[frozenset[str], list[str]] = {}
    for tag, ids in sorted(large.items()):
        names.setdefault(frozenset(ids), []).append(tag)
    for same, tags in names.items():
        yield Slice(TAG, " = ".join(tags), same)
    small = [tag for tag, ids in held.items() if len(ids) < LEAST]
    rest = frozenset(name for tag in small for name in held[tag])
    if rest and len(rest) < len(rows):
        yield Slice(TAG, f"{OTHER} ({len(small)} of less than {LEAST} prompts)", rest)


def _thirds(by: str, lengths: Mapping[str, int]) -> list[Slice]:
    """Three of about the same size; equal lengths stay together, so one may be missing."""
    if len(set(lengths.values())) < 3:
        return []
    ordered = sorted(lengths.values())
    bounds = [ordered[math.ceil(len(ordered) * part / 3) - 1] for part in (1, 2)]
    parts: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for name, length in lengths.items():
        parts[sum(length > bound for bound in bounds)].add(name)
    found = []
    for ids in filter(None, parts.values()):
        own = [lengths[name] for name in ids]
        found.append(Slice(by, f"{min(own)} to {max(own)} characters", frozenset(ids)))
    return found


def fisher(ours: Sequence[bool], others: Sequence[bool]) -> float:
    """Two-sided p value of Fisher's exact test: of all tables with these margins, those that are no
    likelier than the one that was found (Fisher 1922, J. R. Stat. Soc. 85(1))."""
    n, total, right = len(ours), len(ours) + len(others), sum(ours) + sum(others)

    def log_p(k: int) -> float:
        return _log_choose(n, k) + _log_choose(total - n, right - k)

    each = [log_p(k) for k in range(max(0, right - (total - n)), min(n, right) + 1)]
    seen, most = log_p(sum(ours)), max(each)
    share = sum(math.exp(p - most) for p in each if p <= seen + 1e-9)
    return min(1.0, share / sum(math.exp(p - most) for p in each))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def standing_out(slices: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each slice that is unlike the rest."""
    lines = []
    for each in slices:
        for figure in SHARES:
            one = each.get(figure) or {}
            if one.get("differs"):
                lines.append(
                    f"{figure} is {one['differs']} the rest on {each['by']} {each['name']}: "
                    f"{one['value']:.0%} of {one['n']} against {one['rest']:.0%} "
                    f"(p {one['p_value']:.2g})"
                )
    return lines
