"""A native runtime in a process of its own, seen from the parent: its death, refusal or silence
becomes a RuntimeFailure with its last lines. The other side is answering.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from edgedistill import machine
from edgedistill.errors import MissingTool, RuntimeFailure

REQUEST_SECONDS = 600.0  # longest wait for one answer
WAIT_SECONDS = 0.5
LAST_LINES = 8

AMX_HINT = (
    "the file may be damaged, or this llama.cpp was compiled by GCC 12, which makes wrong code for "
    "AMX, and this processor has that: in the checkout run scripts/setup_env.py; elsewhere install "
    "it again without: CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-mno-amx-int8 pip install --force-reinstall "
    "--no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)


def ending(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def crash_hint(code: int, cpu_features: Sequence[str]) -> str | None:
    """What to do about a process with llama.cpp in it that ended so; None: nothing is known."""
    if code == -signal.SIGSEGV and "amx_int8" in cpu_features:
        return AMX_HINT
    return None


@dataclass(frozen=True)
class Program:
    """What runs in a child: `module` is started with -m; `packages` maps the Python modules it
    cannot do without to the packages that bring them, which `extra` installs."""

    runtime: str
    module: str
    packages: Mapping[str, str]
    extra: str

    @property
    def command(self) -> tuple[str, ...]:
        """What starts it in this Python."""
        return (sys.executable, "-m", self.module)


class Child:
    """The process, its pipes, and what it printed; `model` is what an error names as its place.
    `command` starts another process that speaks the same requests; with `greeting`, what it prints
    until a line that begins with that is no answer, and `greeted` is what stands behind it."""

    def __init__(
        self,
        program: Program,
        model: Path,
        request_seconds: float = REQUEST_SECONDS,
        command: Sequence[str] | None = None,
        greeting: str | None = None,
    ) -> None:
        self._program = program
        self._model = model
        self._request_seconds = request_seconds
        self._is_ours = command is None or tuple(command) == program.command
        self._greeting = greeting
        self.greeted = ""
        # A file, not a pipe: nobody has to read it, and it is there when the process has died.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            program.command if command is None else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=machine.child_environment(),
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            if self._greeting is not None:
                self._hear(stream, self._greeting.encode())
            for line in stream:
                self._answers.put(line)
        self._answers.put(b"")

    def _hear(self, stream: IO[bytes], greeting: bytes) -> None:
        """Read up to the greeting: shells elsewhere print what they like before."""
        for line in stream:
            if line.startswith(greeting):
                self.greeted = line[len(greeting) :].decode("utf-8", "replace").strip()
                return

    @property
    def closed(self) -> bool:
        return self._printed.closed

    @property
    def running(self) -> bool:
        return not self.closed and self._process.poll() is None

    def ask(self, do: str, **given: Any) -> Any:
        """The child's answer to one request.

        Raises:
            RuntimeFailure: it refused, died, or did not answer in time; then it is closed.
            MissingTool: one of its packages is not installed. OSError: what the system refused.
        """
        runtime = self._program.runtime
        if self.closed:
            raise RuntimeFailure(f"{runtime} was asked to {do} after it was closed")
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps({"do": do, **given}).encode() + b"\n")
            stream.flush()
            line = self._next_line()
        except (OSError, ValueError):  # it has gone, or another thread has closed us
            line = b""
        except queue.Empty:
            self._process.kill()
            self._fail(f"{runtime} gave no answer to '{do}' for {self._request_seconds:g} s")
        except BaseException:
            self.close()  # Ctrl-C: an answer that comes later must not be taken for another's
            raise
        if not line:
            code = self._process.wait(timeout=60)
            what = f"{runtime} died while it was asked to {do}: {ending(code)}"
            # A device's or an emulator's child has another processor, and another llama.cpp.
            hinted = self._is_ours and runtime == "llama.cpp"
            features = machine.facts()["cpu_features"] if hinted else ()
            self._fail(what, crash_hint(code, features))
        answer = json.loads(line)
        if answer.get("errno") is not None:
            self.close()
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if "error" in answer:
            self._fail(f"{do}: {answer['error']}")
        return answer["ok"]

    def _next_line(self) -> bytes:
        end = time.monotonic() + self._request_seconds
        while True:
            left = end - time.monotonic()
            try:
                # In slices: on Windows, Ctrl-C does not get through a longer wait.
                return self._answers.get(timeout=min(WAIT_SECONDS, max(left, 0.001)))
            except queue.Empty:
                if left <= WAIT_SECONDS:
                    raise

    def _fail(self, what: str, hint: str | None = None) -> NoReturn:
        lines = self.last_lines()
        self.close()
        for module, package in self._program.packages.items():
            if any(f"No module named '{module}'" in line for line in lines):
                raise MissingTool(
                    f"the package {package} is not installed",
                    hint=f'in the checkout: pip install -e ".[{self._program.extra}]"',
                )
        said = "".join(f"\n    {line}" for line in lines)
        raise RuntimeFailure(
            f"{what}; its last lines:{said}" if said else what,
            where=str(self._model),
            hint=hint
            or f"the file may be damaged or made for another version of {self._program.runtime}",
        )

    def last_lines(self) -> list[str]:
        try:
            self._printed.seek(0, os.SEEK_END)
            self._printed.seek(max(0, self._printed.tell() - 8192))
            text = self._printed.read().decode("utf-8", "replace")
        except ValueError:  # another thread has closed us
            return []
        return [line for line in text.splitlines() if line.strip(" .")][-LAST_LINES:]

    def close(self) -> None:
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()  # the child ends itself on this
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.join()
        self._printed.close()
