"""A real sshd with keys of its own, on loopback in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

PORT = 2222
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
SetEnv HOME={folder}/home
"""
CLIENT = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
"""
STARTING_SECONDS = 10


def problem() -> str | None:
    """Why none can be started here; None when one can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root for a network namespace"
    needed = ("ssh", "ssh-keygen", "ip", "tc")
    missing = [name for name in needed if shutil.which(name) is None]
    missing += [] if _sshd() else ["sshd"]
    if missing:
        return f"{', '.join(missing)} not found (Debian: openssh-server iproute2)"
    made = _ip("netns", "add", "edgedistill-try", check=False)
    _ip("netns", "del", "edgedistill-try", check=False)
    return None if made.returncode == 0 else f"no network namespace: {made.stderr.strip()}"


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


class Sshd:
    """Its home is `home`; what runs inside the namespace, by `inside`, reaches it at `address`."""

    address = f"ssh://127.0.0.1:{PORT}"

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        for name in ("key", "host"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(keygen, check=True)
        kind, key = (folder / "host.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{PORT} {kind} {key}\n")
        (folder / "sshd_config").write_text(CONFIG.format(port=PORT, folder=folder))
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
        ssh = folder / "bin" / "ssh"  # the system's, with a configuration of our own
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd does not start without it
        self._space = f"edgedistill-{os.getpid()}"
        _ip("netns", "add", self._space)
        _ip("netns", "exec", self._space, "ip", "link", "set", "lo", "up", "mtu", "1500")
        words = [*self.inside, str(_sshd()), "-D", "-e", "-f", str(folder / "sshd_config")]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(words, stderr=self._log)
        self._until_it_listens()

    @property
    def inside(self) -> list[str]:
        return ["ip", "netns", "exec", self._space]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def slow(self, rate: str) -> None:
        """Let no more through than `rate`, as tc has it."""
        shape = ["tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
        words = [*self.inside, "tc", "qdisc", "replace", "dev", "lo", "root", *shape]
        subprocess.run(words, check=True)

    def fast(self) -> None:
        words = [*self.inside, "tc", "qdisc", "del", "dev", "lo", "root"]
        subprocess.run(words, check=False, capture_output=True)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()
        _ip("netns", "del", self._space, check=False)

    def _until_it_listens(self) -> None:
        end = time.monotonic() + STARTING_SECONDS
        while "Server listening" not in (self.folder / "log").read_text():
            if time.monotonic() > end or self._process.poll() is not None:
                self.end()
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.05)
