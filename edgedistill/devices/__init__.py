"""Devices elsewhere as places where a model file is measured: `bench MODEL --device ADDRESS`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from edgedistill.devices.address import ADB, EMULATED, LOCAL, SSH, Address
from edgedistill.devices.transport import Transport
from edgedistill.errors import UsageError, did_you_mean
from edgedistill.places import Here, Place
from edgedistill.progress import Progress


@contextlib.contextmanager
def place_at(
    at: Address, model: Path, own_runner: Path | None, keep: bool, progress: Progress
) -> Iterator[Place]:
    """The place of an address, with `model` there; what each argument is: place.device.

    Raises:
        UsageError: the address names nothing that there is, or `model` is no GGUF file.
        DeviceError, StorageError, MissingTool, WeightsError, RuntimeFailure: as place.device and
            emulator.prepare_aarch64.
    """
    if at.scheme == LOCAL:
        yield Here()
        return
    if model.is_dir():
        raise UsageError(
            "an ONNX model is measured on this machine alone: the runner on a device is llama.cpp",
            where=str(model),
            hint="give a GGUF file, or leave --device out",
        )
    if at.scheme == EMULATED:
        yield _emulated(at.name, progress)
        return
    from edgedistill.devices.place import device

    with device(_transport(at), model, own_runner, keep, progress) as place:
        yield place


def _emulated(name: str, progress: Progress) -> Place:
    from edgedistill.devices.emulated import EmulatedPlace
    from edgedistill.emulator import PROCESSORS, prepare_aarch64

    if name not in PROCESSORS:
        known = f"there are {', '.join(f'emulated://{each}' for each in PROCESSORS)}"
        hint = f"{did_you_mean(name, PROCESSORS)} {known}".strip()
        raise UsageError(f"--device emulated://{name}: no such device is emulated", hint=hint)
    return EmulatedPlace(name, prepare_aarch64(name, progress))


def _transport(at: Address) -> Transport:
    if at.scheme == SSH:
        from edgedistill.devices.ssh import Ssh

        return Ssh(at)
    assert at.scheme == ADB
    from edgedistill.devices.adb import connected

    return connected(at.name)
