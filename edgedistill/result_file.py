"""A result: what one sitting of `edgedistill bench MODEL` measured, in a file that is read again
months later, beside others, by another version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import write_json
from edgedistill.figures import SHARES
from edgedistill.kept_file import Held, Kept
from edgedistill.measures import STATISTICS, Measure

KIND, VERSION = "edgedistill-result", 1
BOUNDS = ("low", "high")
PARTS = (
    "made",
    "edgedistill",
    "model",
    "device",
    "load",
    "conditions",
    "settings",
    "figures",
)
HINT = "results are made by `edgedistill bench MODEL --out FILE`"
RESULT = Kept(KIND, VERSION, "result", PARTS, HINT)
SECTIONS = {  # of a result: what each must hold
    "model": ("name", "sha256", "bytes"),
    "device": ("address", "cpu", "fingerprint"),
    "load": ("busy",),
    "conditions": (),
    "settings": (),
    "token_mix": ("source", "digest", "prompts"),
    "check": ("kind",),
    "likeness": ("rows", "agreement", "gold"),
    "roofline": (
        "bandwidth_gb_s", "compute_gflops", "bytes_per_token", "flops_per_token", "decode_share",
        "prefill_share",
    ),
}  # fmt: skip
RATES = ("pp512", "tg128")
OPTIONAL = ("token_mix", "check", "likeness", "roofline")
SHARE = ("value", "low", "high", "n")
FLAGS = (
    "same",
    "gold",
    "refuses",
    "answers",
    "drifts",
)  # of a row; an older file has the first two


@dataclass(frozen=True)
class Result:
    """`figures` by name (docs/bench.md says what each is). `load` and `conditions` say what the
    device was in. `token_mix`, `check` and `likeness` are None where no prompts were given. Of a
    server `model` has no file, sha256 or bytes (None), but the model IDs that `answered`; a far
    one's `load` and `conditions`, and what its `device` is, are None, too. `roofline` is None where
    the device's ceilings were not measured. `token_mix.dataset` is the digest of the dataset whose
    held-out prompts were asked, all of them; of a bundle, which tells its prompts by that alone,
    `token_mix.digest` is None. `model.bundle`: see bundle_result. `sitting` is a random
    ID, alike in the results of models that were measured in turn; None where one was alone."""

    made: str  # UTC, ISO 8601
    edgedistill: str
    model: Mapping[str, Any]  # name, file, sha256, bytes, format, parameters, bundle
    device: Mapping[str, Any]  # address, facts of the machine, runtime
    load: Mapping[str, Any]
    conditions: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Measure]
    token_mix: Mapping[str, Any] | None = None
    check: Mapping[str, Any] | None = None
    likeness: Mapping[str, Any] | None = None
    roofline: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    sitting: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As the file has it. JSON has no nan: the bounds of an unknown interval are null."""
        figures = {name: written(asdict(each)) for name, each in self.figures.items()}
        return {"kind": KIND, "version": VERSION, **asdict(self), "figures": figures}


def write_result(result: Result, file: Path) -> None:
    """Write it whole, or not at all."""
    write_json(file, result.to_json())


def read_result(file: Path, held: Held | None = None) -> Result:
    """Read a result file; `held` is what it holds, where that was looked at already.

    Raises:
        ArtifactError: it cannot be read, is cut off, is no result, or is of a later version.
    """
    value = RESULT.read(file) if held is None else RESULT.fields(file, held.value)
    known = {name: value[name] for name in Result.__dataclass_fields__ if name in value}
    try:
        if not isinstance(value["figures"], Mapping):
            raise ValueError("figures is no object")
        figures = {name: read_measure(name, each) for name, each in value["figures"].items()}
        result = Result(**{**known, "figures": figures})
        require_whole(result)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise RESULT.refused(file, f"it is damaged: {error}") from error
    return result


def read_measure(name: str, value: Any) -> Measure:
    """A figure of a file whose parts are what they should be: it is also written by hand. An
    interval that is not known has nan for its ends.

    Raises:
        ValueError, TypeError, AttributeError: they are not.
    """
    unknown = {end: math.nan for end in BOUNDS if value.get(end, math.nan) is None}
    found = Measure(**{**value, **unknown})
    values = [found.value, *(each for group in found.groups for each in group)]
    numbers = all(map(_is_number, (*values, found.low, found.high)))
    if not numbers or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} has something that is no number")
    if not found.groups or not all(found.groups) or found.statistic not in STATISTICS:
        raise ValueError(f"{name} has an empty group, or is no {', '.join(STATISTICS)}")
    return found


def _is_number(value: Any) -> bool:
    """A bound may be nan where it is not known: see read_measure."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def require_whole(result: Result) -> None:
    """What every reader of a result counts on.

    Raises:
        ValueError, KeyError, TypeError: it is not there.
    """
    for section, names in SECTIONS.items():
        held = getattr(result, section)
        if held is None and section in OPTIONAL:
            continue
        if not isinstance(held, Mapping):
            raise ValueError(f"{section} is no object")
        if missing := [name for name in names if name not in held]:
            raise ValueError(f"{section} lacks {', '.join(missing)}")
    if not isinstance(result.sitting, str | None):
        raise ValueError("sitting is no text")
    _require_roofline(result)
    parts = (result.conditions.get("before"), result.conditions.get("after"))
    if not all(part is None or isinstance(part, Mapping) for part in parts):
        raise ValueError("a reading of conditions is no object")
    if not isinstance(result.device.get("runtime") or {}, Mapping):
        raise ValueError("device.runtime is no object")
    size = result.model["bytes"]
    if size is not None and (not _is_number(size) or size < 1):
        raise ValueError("model.bytes is no size")
    _require_whole_chain((result.model.get("bundle") or {}).get("chain") or [])
    _require_whole_answers(result.likeness or {"rows": [], "agreement": None, "gold": None})


def _require_roofline(result: Result) -> None:
    """With the rates that its shares are of."""
    if result.roofline is None:
        return
    for name in SECTIONS["roofline"]:
        if not _is_finite(result.roofline[name]) or not result.roofline[name] > 0:
            raise ValueError(f"roofline.{name} is no number above 0")
    if missing := [name for name in RATES if name not in result.figures]:
        raise ValueError(f"there is a roofline, and no figure {', '.join(missing)}")


def _require_whole_chain(links: Sequence[Mapping[str, Any]]) -> None:
    for link in links:
        shares = [link["agreement_before"], link["agreement_after"]]
        _ = link["before"], link["after"]
        known = [*shares, *filter(None, [link["mean_kld"], link["prompts"]])]
        if not all(map(_is_number, known)):
            raise ValueError("a link of model.bundle.chain has something that is no number")


def _require_whole_answers(likeness: Mapping[str, Any]) -> None:
    for row in (*likeness["rows"], *likeness.get("refused", [])):
        flags = [row[name] for name in FLAGS if name in row]
        if "id" not in row or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError("an answer has no id, or a verdict that is not true or false")
    for name in SHARES:
        share = likeness.get(name)
        if share is not None and not all(_is_finite(share[part]) for part in SHARE):
            raise ValueError(f"likeness.{name} is no share with its interval")


def written(figure: dict[str, Any]) -> dict[str, Any]:
    """A figure as a file has it: JSON has no nan."""
    unknown = {name: None for name in BOUNDS if math.isnan(figure[name])}
    return {**figure, **unknown}
