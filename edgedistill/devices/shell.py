"""Scripts run in a POSIX shell of a device, and bytes sent into them.

What a login shell prints by itself (a greeting, a message of the day) is told from a script's own
output by a line before and one behind it, which also carries the exit code: not every transport
does. Without the line behind, the connection broke.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from edgedistill.devices.transport import Transport
from edgedistill.errors import EdgedistillError

SILENT = "no answer came in time"
BEGIN, END = "edgedistill-begins", "edgedistill-ends"
ANSWER_SECONDS = 120.0
STALL_SECONDS = 60.0  # without a byte that goes through
CHUNK = 1 << 18
quote = shlex.quote


@dataclass(frozen=True)
class Said:
    """What a script printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Its last line of complaint."""
        lines = self.err.strip().splitlines() or self.out.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Shell:
    """The shell of one device."""

    transport: Transport

    @property
    def address(self) -> str:
        return self.transport.address

    def run(self, script: str, step: str, seconds: float = ANSWER_SECONDS) -> Said:
        """Run `script` to its end; `step` is what an error says that was going on.

        Raises:
            DeviceError: the device cannot be reached, or was lost.
        """
        with self._started(script) as (process, printed, complained):
            with contextlib.suppress(OSError):
                _stream(process.stdin).close()
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
            return self._told(step, code, printed, complained)

    def send(self, script: str, step: str, source: BinaryIO, told: Callable[[int], None]) -> Said:
        """As `run`, with the rest of `source` for its stdin; `told` gets the bytes of each part
        that went on its way."""
        with self._started(script) as (process, printed, complained):
            with _ended_when_stalled(process) as moved:
                for chunk in iter(lambda: source.read(CHUNK), b""):
                    try:
                        _stream(process.stdin).write(chunk)
                        _stream(process.stdin).flush()
                    except OSError:  # a closed pipe: what the other side said tells why
                        break
                    moved()
                    told(len(chunk))
            with contextlib.suppress(OSError):
                _stream(process.stdin).close()
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(STALL_SECONDS)
            return self._told(step, code, printed, complained)

    @contextlib.contextmanager
    def _started(self, script: str) -> Iterator[tuple[subprocess.Popen[bytes], BinaryIO, BinaryIO]]:
        # Files, not pipes: nobody has to read them, whatever a device prints.
        with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complained:
            process = subprocess.Popen(
                list(self.transport.words(_framed(script))),
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=complained,
            )
            try:
                yield process, printed, complained
            finally:
                process.kill()
                with contextlib.suppress(OSError):
                    _stream(process.stdin).close()
                process.wait()

    def _told(self, step: str, code: int | None, printed: BinaryIO, complained: BinaryIO) -> Said:
        out, err = _text(printed), _text(complained)
        found = _between(out)
        if found is None:
            # What stands before our first line is a login shell's.
            said = f"{err}\n{out.partition(BEGIN)[0]}"
            error = self.transport.blame(f"{said}\n{SILENT}" if code is None else said)
            error.what = f"{step}: {error.what}"
            raise error
        return Said(found[0], found[1], err)

    def lost(self) -> EdgedistillError | None:
        """Why the device cannot be reached any more; None when it can."""
        try:
            self.run("true", "looking for the device")
        except EdgedistillError as error:
            return error
        return None


def _framed(script: str) -> str:
    # The C locale, so that numbers and reasons are written in one way.
    return (
        f"LC_ALL=C; export LC_ALL; printf '\\n%s\\n' {BEGIN}; (\n{script}\n)\n"
        f"printf '\\n%s %s\\n' {END} $?"
    )


def _between(out: str) -> tuple[int, str] | None:
    """Exit code and output of a script in all that came; None where its end did not."""
    _, begun, rest = out.partition(f"\n{BEGIN}\n")
    inside, ended, behind = rest.rpartition(f"\n{END} ")
    code, whole, _ = behind.partition("\n")  # without the line's end digits may be missing
    if not begun or not ended or not whole or not code.isdigit():
        return None
    return int(code), inside


def _text(stream: BinaryIO) -> str:
    stream.seek(0)
    # adb on Windows turns line ends around.
    return stream.read().decode("utf-8", "replace").replace("\r\n", "\n")


def _stream(stream: object) -> BinaryIO:
    assert stream is not None
    return stream  # type: ignore[return-value]


@contextlib.contextmanager
def _ended_when_stalled(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], None]]:
    """End `process` when the function that this gives was not called for STALL_SECONDS."""
    last, done = [time.monotonic()], threading.Event()

    def moved() -> None:
        last[0] = time.monotonic()

    def watch() -> None:
        while not done.wait(1.0):
            if time.monotonic() - last[0] > STALL_SECONDS:
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield moved
    finally:
        done.set()
        watcher.join()
