"""The device's side of adb over TCP, as much of it as `adb connect` and `adb shell` need: one
message is a header of six little-endian words and a payload (AOSP, packages/modules/adb,
protocol.txt), and within a stream the shell protocol frames stdin, stdout and the exit code
(shell_protocol.h). Commands run in this machine's sh, with a folder in place of /data/local/tmp.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path
from queue import SimpleQueue

VERSION, MOST = 0x01000001, 1 << 18  # of a payload; from this version on there is no checksum
HEADER = struct.Struct("<6I")
CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little")
    for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
FRAME = struct.Struct("<BI")
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
BANNER = b"device::ro.product.name=test;ro.product.model=Test;features=shell_v2,cmd"
ROOT = "/data/local/tmp"
GETPROP = """\
#!/bin/sh
case $1 in ro.product.model) echo "Test Phone";; ro.build.version.release) echo 14;; esac
"""
DUMPSYS = "#!/bin/sh\nprintf '  AC powered: false\\n  USB powered: true\\n  level: 81\\n'\n"


class AdbDevice:
    """One device at 127.0.0.1:`port`. `trusts`: whether it lets computers in without a question."""

    def __init__(self, folder: Path, trusts: bool = True) -> None:
        self.tmp, self._trusts = folder / "tmp", trusts
        programs = folder / "bin"
        for made in (self.tmp, programs):
            made.mkdir(parents=True, exist_ok=True)
        for name, text in (("getprop", GETPROP), ("dumpsys", DUMPSYS)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def vanish(self) -> None:
        """As when a cable is pulled."""
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        link, streams = _Link(connection), dict[int, _Stream]()
        try:
            while True:
                command, theirs, ours, data = link.receive()
                if command == CNXN and self._trusts:
                    link.send(CNXN, VERSION, MOST, BANNER)
                elif command in (CNXN, AUTH):
                    link.send(AUTH, 1, 0, bytes(20))
                elif command == OPEN:
                    number = len(streams) + 1
                    streams[number] = _Stream(self, link, number, theirs, data)
                elif command == WRTE:
                    link.send(OKAY, ours, theirs)
                    streams[ours].heard(data)
                elif command == OKAY:
                    streams[ours].ready.put(True)
                elif command == CLSE and ours in streams:
                    streams[ours].end()
        except (OSError, EOFError):
            for stream in streams.values():
                stream.end()


class _Link:
    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._guard = connection, threading.Lock()

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = HEADER.pack(command, first, second, len(data), 0, command ^ 0xFFFFFFFF)
        with self._guard:
            self._connection.sendall(head + data)

    def receive(self) -> tuple[int, int, int, bytes]:
        command, first, second, size, _, _ = HEADER.unpack(self._whole(HEADER.size))
        return command, first, second, self._whole(size)

    def _whole(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            part = self._connection.recv(size - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)


class _Stream:
    """One `adb shell` command and its pipes."""

    def __init__(
        self, device: AdbDevice, link: _Link, ours: int, theirs: int, asked: bytes
    ) -> None:
        self._link, self._ours, self._theirs = link, ours, theirs
        self.ready: SimpleQueue[bool] = SimpleQueue()
        self._writing, self._rest = threading.Lock(), b""
        service, _, command = asked.rstrip(b"\0").decode().partition(":")
        if not service.startswith("shell,v2"):
            link.send(CLSE, 0, theirs)
            return
        link.send(OKAY, ours, theirs)
        self._process = subprocess.Popen(
            ["sh", "-c", command.replace(ROOT, str(device.tmp))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=device.environment,
            bufsize=0,
            start_new_session=True,
        )
        threading.Thread(target=self._run, daemon=True).start()

    def heard(self, data: bytes) -> None:
        self._rest += data
        pipe = self._process.stdin
        assert pipe is not None
        while len(self._rest) >= FRAME.size:
            kind, size = FRAME.unpack_from(self._rest)
            if len(self._rest) < FRAME.size + size:
                return
            part = self._rest[FRAME.size : FRAME.size + size]
            self._rest = self._rest[FRAME.size + size :]
            with contextlib.suppress(OSError):
                if kind == STDIN:
                    view = memoryview(part)
                    while view:
                        view = view[pipe.write(view) :]
                elif kind == CLOSE_STDIN:
                    pipe.close()

    def end(self) -> None:
        self.ready.put(True)  # no OKAY comes any more: whoever waits for one would never end
        with contextlib.suppress(OSError, AttributeError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _run(self) -> None:
        pipes = ((self._process.stdout, STDOUT), (self._process.stderr, STDERR))
        readers = [threading.Thread(target=self._pass, args=pair, daemon=True) for pair in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        code = self._process.wait()
        with contextlib.suppress(OSError):
            self._say(EXIT, bytes([code & 0xFF if code >= 0 else 128 - code]))
            self._link.send(CLSE, self._ours, self._theirs)

    def _pass(self, pipe: object, kind: int) -> None:
        with contextlib.suppress(OSError):
            while part := pipe.read(1 << 16):  # type: ignore[attr-defined]
                self._say(kind, part)

    def _say(self, kind: int, data: bytes) -> None:
        """A part at a time: the next one waits for the other side's OKAY."""
        with self._writing:
            self._link.send(WRTE, self._ours, self._theirs, FRAME.pack(kind, len(data)) + data)
            self.ready.get()
