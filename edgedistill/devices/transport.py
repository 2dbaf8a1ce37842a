"""What a way to reach a device must be able to do, for shell.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgedistill.errors import EdgedistillError


class Transport(Protocol):
    """A program of this machine that runs scripts in a POSIX shell of the device, with stdin and
    stdout passed through byte for byte."""

    @property
    def address(self) -> str:
        """As results name the device."""

    @property
    def folder(self) -> str:
        """Where files of ours go there: a word of the device's shell."""

    def words(self, script: str) -> Sequence[str]:
        """The command of this machine that runs `script` there.

        Raises:
            MissingTool: the program is not installed.
        """

    def blame(self, said: str) -> EdgedistillError:
        """Why the device was not reached, or was lost, from the last words of the program."""
