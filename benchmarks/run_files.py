"""What benchmarks/run.py keeps of a run: one JSON file with the facts of its machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.artifacts import write_json
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.kept_file import Kept
from edgedistill.measures import Measure
from edgedistill.result_file import read_measure, written

KIND, VERSION = "edgedistill-benchmarks", 1
PARTS = ("made", "machine", "load", "benchmarks")
HINT = "runs are made by `python benchmarks/run.py`"
RUN = Kept(KIND, VERSION, "run of the benchmarks", PARTS, HINT)


@dataclass
class Run:
    """Grows while it is measured. `benchmarks` and, with --against, `against_benchmarks`: seconds
    of one call by name. `load` is None until the hot paths are measured."""

    made: str  # UTC, ISO 8601
    edgedistill: str
    machine: Mapping[str, Any]
    commit: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    load: Mapping[str, Any] | None = None
    complete: bool = False
    benchmarks: dict[str, Measure] = field(default_factory=dict)
    against: Mapping[str, Any] | None = None
    against_benchmarks: dict[str, Measure] = field(default_factory=dict)
    judged: list[dict[str, Any]] = field(default_factory=list)
    scripts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Whole, or not at all.

        Raises:
            StorageError: there is no space, or no permission.
        """
        value = {"kind": KIND, "version": VERSION, **asdict(self)}
        for side in ("benchmarks", "against_benchmarks"):
            value[side] = {name: written(each) for name, each in value[side].items()}
        write_json(file, value)


def read_run(file: Path) -> Run:
    """An earlier run.

    Raises:
        ArtifactError: it cannot be read, is cut off, is no run, or is of another version.
    """
    value = RUN.read(file)
    try:
        known = {name: value[name] for name in Run.__dataclass_fields__ if name in value}
        for side in ("benchmarks", "against_benchmarks"):
            measured = value.get(side, {}).items()
            known[side] = {name: read_measure(name, each) for name, each in measured}
        run = Run(**known)
        _ = run.machine["fingerprint"], None if run.load is None else run.load["busy"]
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise RUN.refused(file, f"it is damaged: {error!r}") from error
    return run


def find_baseline(path: Path, fingerprint: str) -> tuple[Path, Run]:
    """The run of a file, or the newest whole one of a folder that this machine has made.

    Raises:
        ArtifactError: it cannot be read, or is another machine's: timings belong to a machine.
        UsageError: the folder has none of this machine.
    """
    if not path.is_dir():
        run = read_run(path)
        if run.machine["fingerprint"] != fingerprint:
            raise ArtifactError(
                f"it was measured on another machine ({run.machine.get('cpu')}, fingerprint "
                f"{run.machine['fingerprint']}; this one is {fingerprint})", where=str(path),
                hint="timings belong to a machine: measure there, or use --against REF here",
            )  # fmt: skip
        return path, run
    runs = [(file, read_run(file)) for file in sorted(path.glob("*.json"))]
    own = [(f, r) for f, r in runs if r.machine["fingerprint"] == fingerprint and r.complete]
    if not own:
        raise UsageError(
            f"no complete run of this machine (fingerprint {fingerprint}) is in this folder; it "
            f"has {len(runs)} of others or incomplete", where=str(path),
            hint="leave --baseline out once, so that there is one",
        )  # fmt: skip
    return max(own, key=lambda each: each[1].made)
