"""An Android device by the system's adb program. All goes through `adb shell`, which passes bytes
through unchanged from Android 7 on, so that files are copied as they are by ssh."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from edgedistill.errors import DeviceError, MissingTool

FOLDER = "/data/local/tmp/edgedistill"  # the one place where adb may write and execute
ASKING_SECONDS = 30.0
INSTALL = "Debian, Ubuntu: apt install adb; elsewhere: Android's platform-tools"
ALLOW = "unlock it and allow USB debugging for this computer"
WIRELESS = "USB debugging on, cable in? Of a device in the network: adb connect HOST:PORT first"


@dataclass(frozen=True)
class Adb:
    """One device by its serial number."""

    serial: str
    program: str = "adb"

    folder = FOLDER

    @property
    def address(self) -> str:
        return f"adb://{self.serial}"

    def words(self, script: str) -> list[str]:
        return [self.program, "-s", self.serial, "shell", "-T", script]

    def blame(self, said: str) -> DeviceError:
        last = said.strip().splitlines()[-1:] or ["adb ended without a word"]
        for sign, what, hint in REASONS:
            if sign in said:
                return DeviceError(what, where=self.address, hint=hint)
        return DeviceError(
            f"the device was lost, or gave no answer: {last[0]}",
            where=self.address,
            hint=f"see whether this prints hello: adb -s {self.serial} shell echo hello",
        )


REASONS = (
    ("unauthorized", "the device does not trust this computer", ALLOW),
    ("authorizing", "the device does not trust this computer yet", ALLOW),
    ("offline", "the device is offline", "unplug it and plug it in again, or adb reconnect"),
    ("not found", "adb does not see the device", WIRELESS),
    ("no devices", "adb does not see the device", WIRELESS),
    ("PTY args", "its adb is too old to pass bytes through", "this needs Android 7 or later"),
    ("cannot connect to daemon", "adb's server does not start here", "try: adb start-server"),
)


def connected(serial: str) -> Adb:
    """The device of this serial number; for "" the only one.

    Raises:
        MissingTool: adb is not installed.
        DeviceError: there is no such device, it may not be used, or there are several.
    """
    program = shutil.which("adb")
    if program is None:
        raise MissingTool("adb is not installed", hint=INSTALL)
    devices = _devices(program)
    if not serial and len(devices) > 1:
        raise DeviceError(
            f"adb sees {len(devices)} devices: {', '.join(sorted(devices))}",
            hint="say which one: adb://SERIAL",
        )
    chosen = serial or next(iter(devices), "")
    state = devices.get(chosen)
    if state is None:
        raise DeviceError(
            f"adb sees {', '.join(sorted(devices))}, and not {serial}" if devices and serial
            else "adb sees no device", where=f"adb://{serial}", hint=WIRELESS,
        )  # fmt: skip
    found = Adb(chosen, program)
    if state != "device":
        raise found.blame(state)
    return found


def _devices(program: str) -> dict[str, str]:
    """State by serial number, as `adb devices` lists them."""
    try:
        done = subprocess.run(
            [program, "devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASKING_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError("adb gives no answer", hint="try: adb kill-server") from None
    if done.returncode != 0:
        raise DeviceError(f"adb cannot list its devices: {done.stderr.strip()}")
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {row[0]: row[1].strip() for row in rows}
