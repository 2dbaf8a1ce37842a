"""The child's side of child.py: one JSON request a line on stdin (`{"do": ...}`), one JSON answer a
line on what was stdout (`{"ok": ...}` or `{"error": ...}`, with an `errno` where the system
refused). Whatever native code prints goes to stderr, which the parent keeps for its error message.
The process ends when stdin closes, also in the middle of a request.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError


class Refused(Exception):
    """The runtime said no; the text is for the user."""


def answer_requests(
    answer: Callable[[str, dict[str, Any]], Any], start: Callable[[], None] = lambda: None
) -> None:
    """Answer requests until stdin closes: `answer(do, given)` gives what goes out as JSON. `start`
    is called once, when whatever is printed already goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)  # native code prints where it likes; answers have a handle of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    start()
    waiting = _requests()
    while True:
        request = waiting.get()
        try:
            found = {"ok": answer(request.pop("do"), request)}
        except (Refused, ArtifactError) as error:
            found = {"error": str(error)}
        except OSError as error:
            found = {"error": str(error), "errno": error.errno, "file": error.filename}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _requests() -> queue.SimpleQueue[dict[str, Any]]:
    """Requests as they come. A closed stdin ends the process at once, whatever it is doing."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return waiting


def holds_any(
    detokenize: Callable[[list[int]], str], made: list[int], stop_texts: Sequence[str]
) -> bool:
    """Whether one of the texts is at the end of what these tokens say. Each token but a special one
    writes at least a byte, so a few behind the longest text's bytes are enough to look at."""
    if not stop_texts:
        return False
    said = detokenize(made[-max(len(text.encode()) for text in stop_texts) - 4 :])
    return any(text in said for text in stop_texts)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its maximum starts with the parent's size at the fork.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return int(info.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
