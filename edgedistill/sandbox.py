"""Programs that a model has written, run on their tests in a process of their own that is kept from
the rest of the machine. What the process does to itself: sandbox_child.py.

**What it is for**: code that is wrong, runs away or does harm by accident: endless loops, all the
memory, deleted files, calls into the network, an exit before the tests. On Linux the kernel holds
it (a namespace without a network, Landlock, seccomp and resource limits, as far as this kernel has
them), elsewhere only Python's audit hook and resource limits do, on Windows the hook and the time
limit alone: code that sets out to get around the hook can. Nowhere is the machine's own kernel
protected from an attack, nor a test from code that is written to deceive it (an object that is
equal to everything passes). For code that you take to be hostile use a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from edgedistill.errors import RuntimeFailure

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 20.0  # for Python to start, on a busy machine
SAID_BYTES = 16 << 10
KEPT = ("SYSTEMROOT",)  # without it Windows starts no Python


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds until it is ended, of processor and of wall-clock time; bytes of
    memory (address space), and of each of `files` files that it may write in its own folder."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    files: int = 16


@dataclass(frozen=True)
class Verdict:
    """Whether the tests ran to their end without an error, why not, and what held the program:
    limits, namespace, landlock, seccomp, audit."""

    passed: bool
    why: str = ""
    held_by: list[str] = field(default_factory=list)


def run_tests(program: str, tests: str, limits: Limits) -> Verdict:
    """Run a program and then its tests, in one module.

    Raises:
        RuntimeFailure: no process of its own can be started, or it cannot be confined.
    """
    with tempfile.TemporaryDirectory(
        prefix="edgedistill-sandbox-", ignore_cleanup_errors=True
    ) as folder:
        process = _started(Path(folder))
        assert process.stdout is not None
        heard = _Heard(process.stdout)
        listener = threading.Thread(target=heard.listen, daemon=True)
        listener.start()
        token = secrets.token_hex(16)
        request = {"token": token, "program": program, "tests": tests, **asdict(limits)}
        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError), process.stdin as stream:
                stream.write(json.dumps(request).encode() + b"\n")
            heard.begun.wait(START_SECONDS)
            listener.join(limits.seconds)
            late = listener.is_alive()
        finally:
            _end(process)
            listener.join()
        return _verdict(bytes(heard.said), token, late, limits, process.returncode)


def _started(folder: Path) -> subprocess.Popen[bytes]:
    # -I: no environment, no user's packages, nothing from its folder; -S: no site-packages.
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeFailure(f"no process can be started for a program: {error}") from error


class _Heard:
    """What the process says: so much, and no more. Its first line is that it begins now."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.said = bytearray()
        self.begun = threading.Event()

    def listen(self) -> None:
        with self._stream as stream:
            while len(self.said) < SAID_BYTES and (part := os.read(stream.fileno(), SAID_BYTES)):
                self.said += part
                if b"\n" in self.said:
                    self.begun.set()
        self.begun.set()


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _verdict(said: bytes, token: str, late: bool, limits: Limits, code: int | None) -> Verdict:
    lines = said.decode("utf-8", "replace").split("\n")
    told = [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == token]
    if not told:
        ending = "its process did not start" if late else f"its process ended with {code}"
        raise RuntimeFailure(f"a program cannot be confined, so it is not run: {ending}")
    first = json.loads(told[0])
    if "refused" in first:
        raise RuntimeFailure(f"a program cannot be confined, so it is not run: {first['refused']}")
    held: list[str] = first["held_by"]
    if late:
        return Verdict(False, f"no end within {limits.seconds:g} s", held)
    if len(told) < 2:
        return Verdict(False, "its process ended before its tests did", held)
    passed = told[1] == "passed"
    return Verdict(passed, "" if passed else told[1].removeprefix("failed "), held)
