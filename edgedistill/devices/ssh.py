"""A device by the system's OpenSSH client: its own configuration, agent and known hosts count.

Nothing is asked of the user (BatchMode), so a key must be there; nothing is asked of the device but
a POSIX shell: neither sftp nor Python.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass

from edgedistill.devices.address import Address
from edgedistill.errors import DeviceError, MissingTool

CONNECT_SECONDS = 15
ALIVE_SECONDS, ALIVE_TRIES = 5, 3  # a device that has vanished is noticed after their product
OPTIONS = (
    "BatchMode=yes",
    f"ConnectTimeout={CONNECT_SECONDS}",
    f"ServerAliveInterval={ALIVE_SECONDS}",
    f"ServerAliveCountMax={ALIVE_TRIES}",
    "LogLevel=ERROR",  # no banners among the reasons
)


@dataclass(frozen=True)
class Ssh:
    """One device by its address."""

    at: Address

    folder = '"$HOME"/.cache/edgedistill'

    @property
    def address(self) -> str:
        user = f"{self.at.user}@" if self.at.user else ""
        host = f"[{self.at.name}]" if ":" in self.at.name else self.at.name
        return f"ssh://{user}{host}" + (f":{self.at.port}" if self.at.port else "")

    def words(self, script: str) -> list[str]:
        program = shutil.which("ssh")
        if program is None:
            raise MissingTool("ssh is not installed", hint="install the OpenSSH client")
        words = [program, "-T"]
        for option in OPTIONS:
            words += ["-o", option]
        words += ["-p", str(self.at.port)] if self.at.port else []
        words += ["-l", self.at.user] if self.at.user else []
        # The login shell may be any: it only has to start sh with one quoted word.
        return [*words, "--", self.at.name, f"exec sh -c {shlex.quote(script)}"]

    def blame(self, said: str) -> DeviceError:
        by_hand = self._by_hand()
        for sign, what, hint in REASONS:
            if sign in said:
                return DeviceError(what, where=self.address, hint=hint.format(by_hand=by_hand))
        last = said.strip().splitlines()[-1:] or ["ssh ended without a word"]
        return DeviceError(
            f"the connection was lost, or the device gave no answer: {last[0]}",
            where=self.address,
            hint=f"see whether this prints hello: {by_hand} echo hello",
        )

    def _by_hand(self) -> str:
        port = f"-p {self.at.port} " if self.at.port else ""
        user = f"{self.at.user}@" if self.at.user else ""
        return f"ssh {port}{user}{self.at.name}"


REASONS = (
    (
        "IDENTIFICATION HAS CHANGED",
        "the host's key is another than the known one",
        "if that is right (a new system), forget the old one with ssh-keygen -R; if not, someone "
        "may be in between",
    ),
    (
        "Host key verification failed",
        "the host's key is not known",
        "connect once by hand, and compare the key that is shown: {by_hand}",
    ),
    (
        "Permission denied (",
        "the device lets no key of yours in",
        "this must work without a password: {by_hand} true (ssh-copy-id puts your key there; "
        "ssh-add unlocks it)",
    ),
    (
        "Could not resolve hostname",
        "no host of this name is known",
        "give its IP address, or an alias of your ssh configuration",
    ),
    (
        "Connection refused",
        "nothing answers at this port",
        "start sshd there (in Termux: sshd, and port 8022), or give its port: ssh://host:port",
    ),
    ("timed out", "it does not answer", "is it awake, and in the same network?"),
    ("No route to host", "it cannot be reached", "is it awake, and in the same network?"),
    ("Network is unreachable", "it cannot be reached", "is this machine in a network?"),
    ("kex_exchange_identification", "what answers at this port is no SSH server", "another port?"),
)
