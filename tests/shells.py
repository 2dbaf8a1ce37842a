"""A device that is this machine: its shell with another home. What the transports of devices have
in common is tried on it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgedistill import machine
from edgedistill.errors import DeviceError

# The runner's requests answered by this Python: for tests that need an answer and no compiler.
STAND_IN = """\
#!/bin/sh
if [ "$1" = --version ]; then echo '{{"runner": "stand-in"}}'; exit; fi
PYTHONPATH={path} exec {python} -m edgedistill.runtime_child
"""


@dataclass
class LocalShell:
    """`sh` is what starts a shell. `lose`: of the next copies that are begun, each breaks off
    behind so many bytes."""

    home: Path
    sh: Sequence[str] = ("sh",)
    lose: list[int] = field(default_factory=list)

    address = "test://here"
    folder = '"$HOME"/.cache/edgedistill'

    def words(self, script: str) -> list[str]:
        if "cat >>" in script and self.lose:
            cut = rf"head -c {self.lose.pop(0)} >> \1; kill -9 $$"
            script = re.sub(r"cat >> (\S+)", cut, script)
        path = f"PATH={self.home}/bin:{os.environ['PATH']}"  # where tests put programs of their own
        return ["env", f"HOME={self.home}", path, *self.sh, "-c", script]

    def blame(self, said: str) -> DeviceError:
        return DeviceError(f"lost ({said.strip()})", where=self.address)


def stand_in(folder: Path) -> Path:
    file, path = folder / "runner", machine.child_environment()["PYTHONPATH"]
    file.write_text(STAND_IN.format(python=sys.executable, path=path))
    return file
