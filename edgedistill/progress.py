"""How a stage tells what it is doing, without knowing who listens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One bar: a context manager that is advanced while the work goes on."""

    def advance(self, amount: float = 1, shown: str = "") -> None: ...
    def __enter__(self) -> Task: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Progress(Protocol):
    """What the CLI hands to every stage."""

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        """Called once per stage, before its work starts or instead of it."""

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        """Called when a stage that was not reused is complete."""

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        """A bar with `total` units (None: unknown); the rate and ETA are the listener's work."""

    def note(self, text: str) -> None:
        """A default that mattered, or a measured choice, with where it came from."""


@dataclass
class Passing:
    """Passes everything on; a listener between a stage and the one that shows it."""

    listener: Progress

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self.listener.stage(name, folder, reused=reused)

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        self.listener.finished(name, seconds, peak_memory_bytes)

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return self.listener.task(label, total, unit)

    def note(self, text: str) -> None:
        self.listener.note(text)


class SilentTask:
    """Advances nothing."""

    def advance(self, amount: float = 1, shown: str = "") -> None:
        pass

    def __enter__(self) -> SilentTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Silent:
    """A listener for library use and tests."""

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        pass

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        pass

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return SilentTask()

    def note(self, text: str) -> None:
        pass
