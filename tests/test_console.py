"""Progress: what is said, and how often."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from edgedistill.console import Live, Plain, Witness, counted, duration, listening, size, speed
from edgedistill.progress import Silent


class Clock:
    """A clock that moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines() -> None:
    said: list[str] = []
    plain = Plain(said.append)
    plain.stage("collect", Path("ws/collect-00"), reused=True)
    plain.stage("distill", Path("ws/distill-11"), reused=False)
    plain.note("precision bf16: measured faster here")
    plain.finished("distill", 241.2, 2_100_000_000)
    assert said == [
        "collect: reused collect-00",
        "distill: running",
        "  precision bf16: measured faster here",
        "distill: 241 s, peak 2.1 GB",
    ]


def test_plain_progress_at_most_every_30_seconds() -> None:
    said: list[str] = []
    clock = Clock()
    with Plain(said.append, clock).task("training", 100, "steps") as task:
        for _ in range(100):
            clock.now += 1
            task.advance(shown="loss 0.5")
    assert said == [
        "  training: 30/100 steps, 1.0 steps/s, 70 s left, loss 0.5",
        "  training: 60/100 steps, 1.0 steps/s, 40 s left, loss 0.5",
        "  training: 90/100 steps, 1.0 steps/s, 10 s left, loss 0.5",
    ]


def test_a_slow_start_is_not_taken_for_the_pace() -> None:
    said: list[str] = []
    clock = Clock()
    with Plain(said.append, clock).task("fit", 100, "steps") as task:
        task.advance(0)  # an earlier run did nothing
        clock.now += 90  # and then something else is measured first
        for _ in range(31):
            clock.now += 1
            task.advance()
    assert said[-1] == "  fit: 31/100 steps, 1.0 steps/s, 69 s left"


def test_live_shows_stages_and_bars() -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    with Live(console) as live:
        live.stage("collect", Path("collect-00"), reused=True)
        live.stage("distill", Path("distill-11"), reused=False)
        with live.task("training [x]", 3, "steps") as task:
            task.advance(shown="loss 0.5")
            live.bars.refresh()
        live.finished("distill", 12, 1 << 30)
    text = console.export_text()
    assert "collect    reused  collect-00" in text
    assert "training [x]" in text
    assert "1/3 steps" in text
    assert "distill    done    12 s, peak 1.1 GB" in text


def test_quiet_says_nothing_and_still_knows_what_ran(tmp_path: Path) -> None:
    said: list[str] = []
    with listening(quiet=True, terminal=False, write=said.append) as progress:
        progress.stage("merge", tmp_path / "merge-00", reused=False)
        progress.stage("export", tmp_path / "export-00", reused=True)
        progress.finished("merge", 1, 1)
    assert said == []
    assert progress.ran == {"merge-00"}


def test_witness_passes_everything_on() -> None:
    said: list[str] = []
    witness = Witness(Plain(said.append))
    witness.note("hello")
    witness.finished("merge", 1, 0)
    assert said == ["  hello", "merge: 1.0 s, peak 0 B"]
    assert Witness(Silent()).ran == set()


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (duration(0.44), "0.4 s"),
        (duration(599), "599 s"),
        (duration(4320), "1 h 12 min"),
        (size(512), "512 B"),
        (size(2e6), "2 MB"),
        (size(5e9), "5.0 GB"),
        (counted(3, None, ""), "3"),
        (counted(1e6, 4e6, "bytes"), "1 MB of 4 MB"),
        (speed(1e6, "bytes"), "1 MB/s"),
        (speed(2.14, "calls"), "2.1 calls/s"),
        (speed(2.14, ""), "2.1/s"),
        (speed(1 / 38, "processes"), "38 s each"),
    ],
)
def test_figures(shown: str, text: str) -> None:
    assert shown == text
