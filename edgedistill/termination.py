"""SIGTERM, as `timeout` and a CI that cancels send it, ends a command as Ctrl-C does: what is kept
is told, and nothing stays on a device.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells tell it


class Termination:
    """Raises KeyboardInterrupt at the first SIGTERM, until `stop`; what follows is let be, so that
    it does not disturb the end. Only in the main thread, where Python lets signals be caught, and
    where nobody else has a use for this one."""

    def __init__(self) -> None:
        self.came = False
        self._process = os.getpid()
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._ours:
            signal.signal(signal.SIGTERM, self._raise)

    @property
    def exit_code(self) -> int:
        """Of a command that was interrupted."""
        return TERMINATED if self.came else INTERRUPTED

    def stop(self) -> None:
        """What SIGTERM did before."""
        if self._ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which its parent ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.came:
            self.came = True
            raise KeyboardInterrupt
