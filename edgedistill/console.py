"""How progress is shown: live bars on a terminal, few plain lines elsewhere, nothing when quiet.

Everything here goes to stderr; stdout belongs to the result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from rich import progress as rich_bars
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from edgedistill.memory import resident
from edgedistill.printable import printable
from edgedistill.progress import Passing, Silent, Task

PLAIN_EVERY_SECONDS = 30.0


@contextlib.contextmanager
def listening(*, quiet: bool, terminal: bool, write: Callable[[str], None]) -> Iterator[Witness]:
    """The listener for one command; `write` takes the plain lines."""
    if quiet:
        yield Witness(Silent())
    elif terminal:
        with Live(Console(stderr=True)) as live:
            yield Witness(live)
    else:
        yield Witness(Plain(write))


@dataclass(frozen=True)
class Shown:
    """What is shown with no control character of its texts: answers and names are others' words.
    Colours and links are rich's own, and stay."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.what, options):
            yield part if part.control else Segment(printable(part.text), part.style)


@dataclass
class Witness(Passing):
    """Remembers which stage folders were made now, not reused."""

    ran: set[str] = field(default_factory=set)

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        if not reused:
            self.ran.add(folder.name)
        super().stage(name, folder, reused=reused)


class Plain:
    """One line when a stage starts or ends, and at most one line of progress every 30 seconds."""

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        every_seconds: float = PLAIN_EVERY_SECONDS,
    ) -> None:
        self.write = write
        self.clock = clock
        self.every_seconds = every_seconds
        self.spoke_at = clock()

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self._say(f"{name}: reused {folder.name}" if reused else f"{name}: running")

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        self._say(f"{name}: {duration(seconds)}, peak {size(peak_memory_bytes)}")

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return PlainTask(self, label, total, unit)

    def note(self, text: str) -> None:
        self._say(f"  {text}")

    def progressed(self, text: Callable[[], str]) -> None:
        if self.clock() - self.spoke_at >= self.every_seconds:
            self._say(text())

    def _say(self, text: str) -> None:
        self.spoke_at = self.clock()
        self.write(text)


class PlainTask:
    """Counts, and offers a line to its Plain."""

    def __init__(self, plain: Plain, label: str, total: float | None, unit: str) -> None:
        self.plain = plain
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.counted_from = (plain.clock(), 0.0)
        self.begun = False

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.done += amount
        self.plain.progressed(lambda: self._line(shown))
        if amount and not self.begun:
            # What comes with the first unit, a start or an earlier run's work, tells no pace.
            self.begun, self.counted_from = True, (self.plain.clock(), self.done)

    def _line(self, shown: str) -> str:
        since, before = self.counted_from
        rate = (self.done - before) / max(self.plain.clock() - since, 1e-9)
        left = None if self.total is None or not rate else (self.total - self.done) / rate
        parts = [counted(self.done, self.total, self.unit), speed(rate, self.unit)]
        parts += [f"{duration(left)} left"] if left is not None else []
        parts += [shown] if shown else []
        return f"  {self.label}: {', '.join(parts)}"

    def __enter__(self) -> PlainTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Live:
    """The running stage with its time and memory, its bars below it; finished ones scroll up."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = rich_bars.Progress(
            rich_bars.SpinnerColumn(),
            rich_bars.TextColumn("{task.description}"),
            rich_bars.BarColumn(bar_width=24),
            _Pace(),
            rich_bars.TimeElapsedColumn(),
            _Memory(),
            console=console,
            transient=True,
        )
        self.running: rich_bars.TaskID | None = None

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self._end()
        if reused:
            self.console.print(f"[green]{name:<10}[/] reused  [dim]{escape(folder.name)}[/]")
        else:
            self.running = self.bars.add_task(f"[bold]{name}[/]", total=None, unit="", shown="")

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        self._end()
        facts = f"{duration(seconds)}, peak {size(peak_memory_bytes)}"
        self.console.print(f"[green]{name:<10}[/] done    {facts}")

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        bar = self.bars.add_task(f"  {escape(label)}", total=total, unit=unit, shown="")
        return LiveTask(self.bars, bar)

    def note(self, text: str) -> None:
        self.console.print(f"[dim]  {escape(text)}[/]")

    def _end(self) -> None:
        if self.running is not None:
            self.bars.remove_task(self.running)
            self.running = None


class LiveTask:
    """One bar of a Live; it goes when its work ends."""

    def __init__(self, bars: rich_bars.Progress, bar: rich_bars.TaskID) -> None:
        self.bars = bars
        self.bar = bar

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.bars.update(self.bar, advance=amount, shown=shown)

    def __enter__(self) -> LiveTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.remove_task(self.bar)


class _Pace(rich_bars.ProgressColumn):
    """Count, rate, time left, and what the stage wants shown."""

    def render(self, task: rich_bars.Task) -> Text:
        unit = task.fields["unit"]
        if task.total is None and not task.completed:
            return Text("")
        parts = [counted(task.completed, task.total, unit)]
        parts += [speed(task.speed, unit)] if task.speed else []
        left = task.time_remaining
        parts += [f"{duration(left)} left"] if left is not None else []
        parts += [task.fields["shown"]] if task.fields["shown"] else []
        return Text("  ".join(parts), style="cyan")


class _Memory(rich_bars.ProgressColumn):
    """Resident memory of this process and its children, beside the stage itself."""

    max_refresh = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.me = psutil.Process()

    def render(self, task: rich_bars.Task) -> Text:
        if task.total is not None:
            return Text("")
        return Text(size(resident(self.me)), style="dim")


def counted(done: float, total: float | None, unit: str) -> str:
    """`120/300 calls`; bytes as sizes."""
    if unit == "bytes":
        return size(done) if total is None else f"{size(done)} of {size(total)}"
    count = f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"
    return f"{count} {unit}".strip()


SLOW = 0.1  # a second: a rate that would be written as next to nothing


def speed(rate: float, unit: str) -> str:
    """`2.1 steps/s`, and of what takes long `38 s each`."""
    if unit == "bytes":
        return f"{size(rate)}/s"
    if 0 < rate < SLOW:
        return f"{duration(1 / rate)} each"
    return f"{rate:,.1f} {unit or ''}/s".replace(" /s", "/s")


def duration(seconds: float) -> str:
    """`0.4 s`, `241 s`, `1 h 12 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in decimal units, as in targets and reports: `2.1 GB`."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
