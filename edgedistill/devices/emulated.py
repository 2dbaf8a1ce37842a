"""An emulated processor as a place: the kernels are those of a device, and the speed of nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import machine, runner
from edgedistill.artifacts import digest_of
from edgedistill.ceilings import Ceilings
from edgedistill.conditions import Conditions
from edgedistill.emulator import REQUEST_SECONDS, Emulator
from edgedistill.load_watch import Load
from edgedistill.places import NONE
from edgedistill.runner import ARM
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import LLAMA, Opened


class NoWatch:
    """Where nothing is timed, nothing disturbs."""

    before: float | None = None

    def stop(self) -> Load:
        return Load(None, None)


@dataclass(frozen=True)
class EmulatedPlace:
    """A device class under QEMU on this machine."""

    device_class: str
    emulator: Emulator

    clock = NONE

    @property
    def address(self) -> str:
        return f"emulated://{self.device_class}"

    def facts(self) -> dict[str, Any]:
        processor = self.emulator.processor
        return {
            "cpu": f"QEMU's {processor.cpu}, emulated",
            "cpu_features": processor.march.split("+")[1:],
            "physical_cores": machine.threads(),
            "logical_cores": machine.threads(),
            "usable_cores": machine.threads(),
            "memory_bytes": machine.facts()["memory_bytes"],
            "architecture": ARM,
            "gpus": [],
            "model": None,
            "os": "QEMU's user-mode emulation",
            "python": None,
            "versions": {},
            "fingerprint": digest_of([self.address, processor.march, processor.cpu])[:12],
            "threads": machine.threads(),
        }

    def runtime(self, model: Path) -> dict[str, Any]:
        march = self.emulator.processor.march
        return {"name": LLAMA, runner.PACKAGE: runner.installed(), "compiled_for": march}

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        return LlamaCpp(
            model,
            threads=threads,
            context_tokens=context_tokens,
            command=self.emulator.command,
            request_seconds=REQUEST_SECONDS,
        )

    def conditions(self) -> Conditions:
        return Conditions(None, None, None, None, None, None)

    def watch(self) -> NoWatch:
        return NoWatch()

    def ceilings(self, threads: int) -> Ceilings | None:
        return None
