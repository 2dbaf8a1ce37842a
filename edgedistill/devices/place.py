"""A device that is reached by a shell, as a place where a model file is measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import runner
from edgedistill.ceilings import Ceilings, asked_ceilings
from edgedistill.child import Child
from edgedistill.conditions import Conditions
from edgedistill.devices.elf import require_fit
from edgedistill.devices.readings import DeviceWatch, Readings
from edgedistill.devices.shell import Shell, quote
from edgedistill.devices.transfer import Store
from edgedistill.devices.transport import Transport
from edgedistill.errors import DeviceError, EdgedistillError, MissingTool, RuntimeFailure
from edgedistill.places import THERE
from edgedistill.progress import Progress
from edgedistill.runtime import LLAMA_CPP, LlamaCpp
from edgedistill.runtimes import LLAMA, Opened

GREETING = "edgedistill-runner"
METHOD = (
    "arrays of 64-bit words, one a thread, larger than the caches, and ggml's product of float32 "
    "matrices of 1024 x 1024, one a thread; the best of 7 passes"
)
REQUEST_SECONDS = 3600.0  # pp512 of a large model on a small board, again and again
LOST = "what this sitting has measured is lost, what was copied is used by the next one"
NOT_EXECUTABLE, SIGNALS = 126, 128  # exit codes of a shell
REASONS = {4: "an instruction that its processor lacks", 31: "a call that its system forbids"}


@dataclass
class DevicePlace:
    """One device with the model and the runner on it; `device` opens one."""

    shell: Shell
    readings: Readings
    told: Mapping[str, Any]  # its facts
    made: Mapping[str, Any]  # what the runner says of itself
    runner: str  # paths there
    model: str

    clock = THERE

    @property
    def address(self) -> str:
        return self.shell.address

    def facts(self) -> dict[str, Any]:
        return dict(self.told)

    def runtime(self, model: Path) -> dict[str, Any]:
        package, _, version = str(self.made.get("sources") or "").partition(" ")
        known = {package: version} if version else {}
        return {"name": LLAMA, **known, "compiled_for": self.made.get("march") or None}

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        return LlamaCpp(
            model,
            threads=threads,
            context_tokens=context_tokens,
            child=self._child(model),
            path=self.model,
        )

    def conditions(self) -> Conditions:
        return self.readings.conditions()

    def watch(self) -> DeviceWatch:
        return self.readings.listen()

    def ceilings(self, threads: int) -> Ceilings | None:
        """None where the runner is another's and has no such request, and where the device does
        not tell its memory, or has too little."""
        memory: int = self.told["memory_bytes"]
        try:
            return asked_ceilings(lambda: self._child(Path(self.runner)), threads, memory, METHOD)
        except RuntimeFailure:
            return None

    def _child(self, shown: Path) -> DeviceChild:
        """The runner, started there; `shown` is what an error names as its place."""
        script = f"printf '\\n%s %s\\n' {GREETING} $$; exec {quote(self.runner)}"
        return DeviceChild(shown, self.shell, self.readings, script)


class DeviceChild(Child):
    """The runner on a device, seen from here; its end also counts what it took there."""

    def __init__(self, model: Path, shell: Shell, readings: Readings, script: str) -> None:
        self._shell, self._readings = shell, readings
        command = shell.transport.words(script)
        super().__init__(LLAMA_CPP, model, REQUEST_SECONDS, command, GREETING)

    def ask(self, do: str, **given: Any) -> Any:
        """As Child.ask.

        Raises:
            DeviceError: the device was lost.
        """
        try:
            return super().ask(do, **given)
        except RuntimeFailure as failure:
            failure.where = f"{self._shell.address}: {failure.where}"
            failure.hint = f"{failure.hint}; or the device had too little memory, and killed it"
            if (lost := self._shell.lost()) is None:
                raise
            lost.what = f"lost while the runner was asked to {do}: {lost.what}"
            lost.hint = f"{lost.hint}; {LOST}" if lost.hint else LOST
            raise lost from failure

    def close(self) -> None:
        if self.running and self.greeted.isdigit():
            with contextlib.suppress(EdgedistillError):
                self._readings.count(int(self.greeted))
        super().close()


@contextlib.contextmanager
def device(
    transport: Transport, model: Path, own_runner: Path | None, keep: bool, progress: Progress
) -> Iterator[DevicePlace]:
    """The device with `model` on it. What is copied there is removed behind the with block, also
    when that fails; with `keep` it stays there once all of it is there. `own_runner`: instead of
    ours.

    Raises:
        DeviceError: the device cannot be reached, lacks what is needed, or was lost.
        StorageError: there is no space for the model. UsageError: the runner is for another device.
        MissingTool: no runner is made for it, or none can be compiled here.
    """
    shell = Shell(transport)
    readings = Readings(shell)
    with progress.task(f"asking {shell.address} what it is", None):
        told = readings.facts()
    chosen = own_runner or _made_for(told, shell, progress)
    require_fit(chosen, told["architecture"])
    store = Store(shell, progress)
    try:
        store.open()
        there = store.put(chosen, "the runner", executable=True)
        made = _tried(shell, there)
        placed = store.put(model, model.name)
        if keep:
            store.keep()
        yield DevicePlace(shell, readings, told, made, there, placed)
    finally:
        store.clean(asked_to_keep=keep)


def _made_for(told: Mapping[str, Any], shell: Shell, progress: Progress) -> Path:
    try:
        build = runner.build_for(told["architecture"], told["cpu_features"])
    except MissingTool as error:
        error.where = shell.address
        raise
    return runner.prepare(build, progress)


def _tried(shell: Shell, path: str) -> Mapping[str, Any]:
    """What the runner says of itself there.

    Raises:
        DeviceError: it does not run there.
    """
    said = shell.run(f"{quote(path)} --version", "starting the runner")
    with contextlib.suppress(ValueError):
        found = json.loads(said.out)
        if said.code == 0 and isinstance(found, dict):
            return found
    what, hint = f"the runner does not run there: {said.reason}", "is it made for this device?"
    if said.code == NOT_EXECUTABLE:
        hint = (
            f"nothing in {path.rpartition('/')[0]} may be executed (mounted noexec?), or the "
            "program is for another processor"
        )
    elif said.code > SIGNALS:
        signal = said.code - SIGNALS
        reason = REASONS.get(signal, "it was killed")
        what = f"the runner does not run there: it ended with signal {signal}, {reason}"
        hint = "compile one for it (docs/bench.md says how), and give it with --runner FILE"
    raise DeviceError(what, where=shell.address, hint=hint)
