"""Threads that take work from one queue, while one of the caller's waits for what they make."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0

Item = TypeVar("Item")
Made = TypeVar("Made")


class Crew(Generic[Item, Made]):
    """Each thread does `work` on one item at a time; an error of it ends the crew. `close` makes
    what is in flight end soon."""

    def __init__(self, work: Callable[[Item], Made], close: Callable[[], None]) -> None:
        self._work, self._close = work, close
        self._todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Made] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def stopping(self) -> bool:
        """Whether no other item is begun: what fails now may only have been cut short."""
        return self._stop.is_set()

    def start(self, items: Iterable[Item], count: int) -> None:
        """Begin, in their order, with so many threads."""
        for item in items:
            self._todo.put(item)
        # Daemons: a call that hangs must not keep a command alive that was told to end.
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def next(self) -> Made:
        """What is made next; raises what ended a thread."""
        while True:
            try:
                # With a timeout, since Windows does not let Ctrl-C through an endless wait.
                came = self._done.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(came, BaseException):
                raise came
            return came[0]

    def stop(self) -> list[Made]:
        """Begin nothing else, and give what is in flight 15 s; what is made until then."""
        self._stop.set()
        self._close()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        late = []
        while not self._done.empty():
            late.append(self._done.get_nowait())
        return [came[0] for came in late if not isinstance(came, BaseException)]

    def _run(self) -> None:
        try:
            while not self.stopping:
                self._done.put((self._work(self._todo.get_nowait()),))
        except queue.Empty:
            return
        except BaseException as error:
            self._stop.set()
            self._done.put(error)
