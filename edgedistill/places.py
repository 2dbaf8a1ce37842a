"""Where a model file is measured: what a sitting asks of a device, and this machine's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedistill import machine
from edgedistill.artifacts import tool_versions
from edgedistill.ceilings import Ceilings, measure_ceilings
from edgedistill.conditions import Conditions, read_conditions
from edgedistill.errors import DeviceError, RuntimeFailure
from edgedistill.load_watch import BUSY_SHARE, Load, LoadWatch
from edgedistill.progress import Progress
from edgedistill.runtimes import LLAMA, ONNX, TRAITS, Opened, open_runtime

# Whose seconds a place's figures are: counted here around each request; the device's own, because
# the way to it takes time, too; or nobody's, because it is emulated and has no speed.
HERE, THERE, NONE = "here", "there", "none"
CLOCKS = {  # what a result says of its seconds
    HERE: (),
    THERE: ("seconds are the device's own, without rendering, tokenizing and the way to it",),
    NONE: ("emulated: nothing was timed, and its answers alone tell of the device",),
}
BEFORE_ALONE = (
    "this system does not tell what ended processes took: other work was listened to before alone, "
    "not while this was measured"
)
NO_CEILINGS = "the device's ceilings are not known: {}"
GONE = (
    "the device was gone when all was measured, so what it was in then and its ceilings are not "
    "known: {}"
)


class Watch(Protocol):
    """Counts what other work takes of a device until it is stopped. `before`: the share that it
    heard at first, None where the device does not tell."""

    before: float | None

    def stop(self) -> Load: ...


class Place(Protocol):
    """A device. `address` says where it is: "local", "ssh://user@host"; it tells results apart."""

    @property
    def address(self) -> str: ...

    @property
    def clock(self) -> str:
        """HERE, THERE or NONE."""

    def facts(self) -> dict[str, Any]:
        """Its hardware and system, as machine.facts has them; fingerprint, usable_cores and threads
        (the default number of them) among them."""

    def runtime(self, model: Path) -> dict[str, Any]:
        """`name` and versions of what runs `model` there."""

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        """The model, loaded there in a process of its own.

        Raises:
            RuntimeFailure: the runtime refuses it or dies. MissingTool: there is none.
        """

    def conditions(self) -> Conditions:
        """As the device tells them now."""

    def watch(self) -> Watch:
        """Listen for a moment to what else runs there, then count it."""

    def ceilings(self, threads: int) -> Ceilings | None:
        """How fast its memory is read and how fast it multiplies; None where nothing there can
        measure that."""


class Here:
    """This machine."""

    address = "local"
    clock = HERE

    def facts(self) -> dict[str, Any]:
        return {**machine.facts(), "threads": machine.threads()}

    def runtime(self, model: Path) -> dict[str, Any]:
        kind = kind_of(model)
        return {"name": kind, **tool_versions(*TRAITS[kind].tools[:2])}

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        kind = kind_of(model)
        return open_runtime(kind, model, threads=threads, context_tokens=context_tokens)

    def conditions(self) -> Conditions:
        return read_conditions()

    def watch(self) -> Watch:
        return LoadWatch()

    def ceilings(self, threads: int) -> Ceilings | None:
        return measure_ceilings(threads)


def kind_of(model: Path) -> str:
    """The runtime of a model: a folder is ONNX, a file GGUF."""
    return ONNX if model.is_dir() else LLAMA


def kernels_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """`kernels`: the instructions and parts that llama.cpp was compiled with and takes there, since
    one version may be compiled in several ways; nothing of a runtime that does not tell."""
    told = [part.partition("=") for part in str(facts.get("kernels", "")).split("|")]
    names = [name.split(":")[-1].strip() for name, _, value in told if value.strip() == "1"]
    return {"kernels": " ".join(names)} if names else {}


@dataclass(frozen=True)
class Last:
    """What a place told when all was measured; None is what it could not tell, and `notes` say why.
    Of a load that was not counted to the end nothing is known, but that it was busy before."""

    load: Load
    conditions: Conditions | None
    ceilings: Ceilings | None
    notes: list[str]


def heard(clock: str, load: Load) -> list[str]:
    """Notes on whose seconds a place's are, and on what else ran there."""
    notes = list(CLOCKS[clock])
    if load.busy:
        notes.append(
            f"other work took {load.told} of this machine's processor time (more than "
            f"{BUSY_SHARE:.0%}): these figures are no measure of it"
        )
    if load.busy is None and clock != NONE:
        notes.append("the device does not tell whether other work disturbed these figures")
    elif load.during is None and clock == HERE:
        notes.append(BEFORE_ALONE)
    return notes


def last_told(place: Place, watch: Watch, threads: int, progress: Progress) -> Last:
    """What a place tells when all is measured. That stands without it: a device may have gone."""
    before = Load(watch.before, None)
    load, conditions = before if before.busy else Load(None, None), None
    try:
        load = watch.stop()
        conditions = place.conditions()
    except DeviceError as error:
        return Last(load, None, None, [GONE.format(error.what)])
    try:
        with progress.task("measuring memory and arithmetic", None):
            return Last(load, conditions, place.ceilings(threads), [])
    except (RuntimeFailure, DeviceError) as error:
        return Last(load, conditions, None, [NO_CEILINGS.format(error.what)])
