"""What a sitting reached of its device's ceilings, and what a file should do elsewhere by that.

Williams, Waterman, Patterson 2009 (the roofline model): decoding reads all weights for each token,
so memory bounds it; prefill multiplies each weight with each token, so arithmetic bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from edgedistill.bench.roofline import load_of
from edgedistill.ceilings import Ceilings
from edgedistill.differences import device_of
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.library import SHIPPED, entries
from edgedistill.measures import Measure
from edgedistill.rates import DECODE_TOKENS, PREFILL_TOKENS
from edgedistill.result_file import Result
from edgedistill.result_set import Named
from edgedistill.target import Target, load_target

DECODE, PREFILL = f"tg{DECODE_TOKENS}", f"pp{PREFILL_TOKENS}"
BY_PROFILE = (
    "on a target decoding gets the share of its bandwidth that was reached here, or its profile's "
    "efficiency where that is less, and prefill all of the profile's compute"
)
MEAN_CONTEXT = DECODE_TOKENS / 2  # of tg128: it begins with an empty cache


def reached(file: Path, figures: Mapping[str, Measure], ceilings: Ceilings) -> dict[str, Any]:
    """A result's `roofline`: the ceilings, what a token of this model costs (`bytes_per_token` read
    in decoding tg128, `flops_per_token` of the matrices that every token of a prompt is multiplied
    with), and the shares that were reached.

    Raises:
        RuntimeFailure: the model's sizes cannot be read.
    """
    load = load_of(file)
    bytes_read = load.weight_bytes + load.kv_bytes_per_token * MEAN_CONTEXT
    flops = 2.0 * load.parameters
    return {
        **asdict(ceilings),
        "bytes_per_token": bytes_read,
        "flops_per_token": flops,
        "decode_share": figures[DECODE].value * bytes_read / (ceilings.bandwidth_gb_s * 1e9),
        "prefill_share": figures[PREFILL].value * flops / (ceilings.compute_gflops * 1e9),
    }


@dataclass(frozen=True)
class Reach:
    """A result's shares of its device's ceilings."""

    result: str
    model: str
    device: str
    bandwidth_gb_s: float
    compute_gflops: float
    decode: float  # tokens/s, measured
    prefill: float
    decode_share: float
    prefill_share: float
    busy: bool = False  # other work disturbed it, so the shares are too low


@dataclass(frozen=True)
class Predicted:
    """What a file should do in tokens/s on `on`, by the shares that it reached at `by` (a result);
    `busy`: other work disturbed that, or the sitting at `on`.
    On a device that was measured, too, and both undisturbed, `decode_error` and `prefill_error` are
    predicted over measured, less 1; else None."""

    model: str
    by: str
    on: str
    decode: float
    prefill: float
    decode_error: float | None = None
    prefill_error: float | None = None
    busy: bool = False


@dataclass(frozen=True)
class Predictions:
    """`checked`: each file on each device that it was measured on, by each other one. `worst`: the
    largest error of those either way, or None where there are none."""

    reached: list[Reach]
    checked: list[Predicted]
    targets: list[Predicted]
    worst_decode_error: float | None
    worst_prefill_error: float | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(named: Sequence[Named], targets: Sequence[Target]) -> Predictions:
    """What the files of these results should do on `targets`, and how far such predictions are from
    what was measured.

    Raises:
        ArtifactError: a result has no roofline. UsageError: targets have none; it names them all.
    """
    _require_profiles(targets)
    for each in named:
        _require_roofline(each)
    checked = [
        _checked(ours, there)
        for ours, there in permutations(named, 2)
        if ours.result.model["sha256"] == there.result.model["sha256"]
        and device_of(ours.result) != device_of(there.result)
    ]
    return Predictions(
        reached=[_reach(each) for each in named],
        checked=checked,
        targets=[_on_target(each, target) for target in targets for each in named],
        worst_decode_error=_worst([each.decode_error for each in checked]),
        worst_prefill_error=_worst([each.prefill_error for each in checked]),
        notes=[*([BY_PROFILE] if targets else []), *_notes(named, checked)],
    )


def _require_roofline(each: Named) -> None:
    if each.result.roofline is None and each.file.is_dir():
        raise ArtifactError(
            "a build does not measure the ceilings of its device",
            where=str(each.file),
            hint="measure the bundle: edgedistill bench BUNDLE --out FILE",
        )
    if each.result.roofline is None:
        raise ArtifactError(
            "it has no ceilings of its device: its notes say why; a server's are not known, nor a "
            "device's with too little memory, nor those of results made by earlier versions",
            where=str(each.file),
            hint="measure the file: edgedistill bench MODEL --out FILE",
        )


def _roofline(result: Result) -> Mapping[str, Any]:
    assert result.roofline is not None
    return result.roofline


def _reach(each: Named) -> Reach:
    result, roof = each.result, _roofline(each.result)
    return Reach(
        result=each.name,
        model=result.model["name"],
        device=result.device["cpu"],
        bandwidth_gb_s=roof["bandwidth_gb_s"],
        compute_gflops=roof["compute_gflops"],
        decode=result.figures[DECODE].value,
        prefill=result.figures[PREFILL].value,
        decode_share=roof["decode_share"],
        prefill_share=roof["prefill_share"],
        busy=bool(result.load["busy"]),
    )


def _rates(result: Result, bandwidth_gb_s: float, compute_gflops: float) -> tuple[float, float]:
    """Tokens/s of decode and prefill under other ceilings, by the shares that were reached."""
    roof = _roofline(result)
    decode = roof["decode_share"] * bandwidth_gb_s * 1e9 / roof["bytes_per_token"]
    prefill = roof["prefill_share"] * compute_gflops * 1e9 / roof["flops_per_token"]
    return decode, prefill


def _checked(ours: Named, there: Named) -> Predicted:
    roof, figures = _roofline(there.result), there.result.figures
    decode, prefill = _rates(ours.result, roof["bandwidth_gb_s"], roof["compute_gflops"])
    busy = bool(ours.result.load["busy"] or there.result.load["busy"])
    return Predicted(
        model=ours.result.model["name"],
        by=ours.name,
        on=there.name,
        decode=decode,
        prefill=prefill,
        decode_error=None if busy else decode / figures[DECODE].value - 1,
        prefill_error=None if busy else prefill / figures[PREFILL].value - 1,
        busy=busy,
    )


def _on_target(each: Named, target: Target) -> Predicted:
    """A profile's bandwidth is a data sheet's, of which less can be read than of a measured one,
    and its compute is already what prefill can use of it (target.Roofline)."""
    profile, roof = target.roofline, _roofline(each.result)
    assert profile is not None
    share = min(roof["decode_share"], profile.efficiency)
    decode = share * profile.bandwidth_gb_s * 1e9 / roof["bytes_per_token"]
    prefill = profile.compute_gflops * 1e9 / roof["flops_per_token"]
    return Predicted(
        each.result.model["name"], each.name, target.name, decode, prefill,
        busy=bool(each.result.load["busy"]),
    )  # fmt: skip


def _require_profiles(targets: Sequence[Target]) -> None:
    without = [target.name for target in targets if target.roofline is None]
    if without:
        shipped = [each for each in entries("target") if each.origin == SHIPPED]
        known = [each.name for each in shipped if load_target(each.path).roofline is not None]
        raise UsageError(
            f"nothing is said of memory and compute by {', '.join(without)}",
            hint=f"{', '.join(known)} have a `roofline`; or give one to a target of your own",
        )


def _worst(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return max(known, key=abs) if known else None


def _notes(named: Sequence[Named], checked: Sequence[Predicted]) -> list[str]:
    notes = [
        f"{each.name}: other work disturbed the machine, so its shares are too low"
        for each in named
        if each.result.load["busy"]
    ]
    for each in named:
        threads = each.result.settings.get("threads")
        cores = each.result.device.get("physical_cores")
        if threads is not None and cores is not None and threads < cores:
            notes.append(
                f"{each.name}: measured with {threads} of {cores} cores, and so are its ceilings"
            )
    if not checked:
        notes.append(
            "no file was measured on two devices: how far these predictions are off is not known"
        )
    return notes
