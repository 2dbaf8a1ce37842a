"""The step to an emulated processor: which rows, what is kept, its bound; no speed of it is
anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgedistill.bench.device import try_emulated
from edgedistill.bench.emulated import (
    Emulated,
    cannot,
    choose,
    identity,
    link,
    measure_emulated,
    threads,
    wanted,
)
from edgedistill.bench.gates import failure, without_clock
from edgedistill.bench.models import Model, Recorded, Runs
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import EvalRow, Kld
from edgedistill.library import find
from edgedistill.progress import Silent, Task
from edgedistill.recipe import BenchSpec, RecipeGates
from edgedistill.target import Target, load_target

ROWS = [EvalRow(f"p{i}", f"prompt {i}", f"answer {i}", "a phrasing", True) for i in range(10)]
SPEC = BenchSpec(emulated_prompts=4)
KLD = Kld(0.001, 0.01, 0.1, 0.99, 400)


def target(name: str, **changes: object) -> Target:
    return load_target(find("target", name)).model_copy(update=changes)


@dataclass
class Told(Silent):
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class FakeRuns:
    """One row of logits a prompt; it breaks at the prompt `breaks`."""

    shift: float = 0.0
    breaks: str = ""
    by: BaseException = field(default_factory=KeyboardInterrupt)
    asked: list[str] = field(default_factory=list)

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        return [f"answer of {row.id}" for row in rows]

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        (row,) = rows
        if row.id == self.breaks:
            raise self.by
        self.asked.append(row.id)
        logits = np.arange(4, dtype=np.float32) * (1 + self.shift)
        with into.open("ab") as stream:
            stream.write(logits.tobytes() * 3)
        return Recorded(3, [], 0.5)

    def model(self) -> Model:
        @contextlib.contextmanager
        def opened() -> Iterator[Runs]:
            yield self

        return Model("fake", opened)


@pytest.mark.parametrize(
    ("name", "changes", "prompts", "expected"),
    [
        ("phone", {}, 4, True),
        ("phone", {}, 0, False),
        ("phone", {"latency": "measured"}, 4, False),  # the device is the machine that builds
        ("metal", {}, 4, False),
        ("laptop", {}, 4, False),
    ],
)
def test_it_is_for_arm_devices_that_are_not_at_hand(
    name: str, changes: dict[str, object], prompts: int, expected: bool
) -> None:
    spec = BenchSpec(emulated_prompts=prompts)
    assert wanted(spec, target(name, **changes)) is expected
    assert (identity(spec, target(name, **changes)) is not None) is expected


def test_what_cannot_be_emulated_is_said() -> None:
    spec = BenchSpec(emulated_prompts=4)
    assert not wanted(spec, target("phone-onnx"))
    assert "ONNX Runtime" in cannot(spec, target("phone-onnx"))[0]
    assert cannot(spec, target("phone")) == []


def test_more_prompts_keep_the_ones_of_fewer() -> None:
    few, many = choose(ROWS, SPEC), choose(ROWS, BenchSpec(emulated_prompts=7))
    assert len(few) == 4
    assert many[:4] == few
    assert choose(list(reversed(ROWS)), SPEC) == few


def test_no_more_threads_than_cores() -> None:
    assert threads(target("phone", threads=10_000)) < 10_000
    assert threads(target("phone", threads=1)) == 1


def test_a_killed_measurement_goes_on_with_the_row_it_was_in(tmp_path: Path) -> None:
    broken, device = FakeRuns(breaks="p6"), FakeRuns(shift=0.1)
    with pytest.raises(KeyboardInterrupt):
        measure_emulated(broken.model(), device.model(), ROWS, tmp_path, Silent())
    whole = FakeRuns()
    found = measure_emulated(whole.model(), device.model(), ROWS, tmp_path, Silent())
    assert whole.asked == ["p6", "p7", "p8", "p9"]
    assert found.kld.tokens == 30
    assert found.kld.mean_kld > 0
    assert found.kld.top1 == 1.0
    assert found.answers["p3"] == "answer of p3"
    assert not list(tmp_path.glob("*.f32"))
    again = FakeRuns(breaks="p0")
    assert measure_emulated(again.model(), again.model(), ROWS, tmp_path, Silent()) == found


def test_an_emulator_that_dies_ends_no_build(tmp_path: Path) -> None:
    dying = FakeRuns(breaks="p6", by=RuntimeFailure("llama.cpp died: signal SIGILL"))
    resume, told = tmp_path / "resume", Told()
    found, notes = try_emulated(FakeRuns().model(), dying.model(), ROWS, resume, told)
    assert found is None
    assert notes == ["fidelity on aarch64 kernels was not measured: llama.cpp died: signal SIGILL"]
    assert told.notes == [f"{notes[0]}; remove {tmp_path} to try again"]


@pytest.mark.parametrize(
    ("prompts", "after", "passed"),
    [
        (10, 0.9, True),  # one prompt of ten: less cannot be seen
        (10, 0.8, False),
        (100, 0.98, True),  # the target's own bound of 0.02
        (100, 0.97, False),
    ],
)
def test_the_bound_is_the_target_s_or_one_prompt(prompts: int, after: float, passed: bool) -> None:
    found = Emulated(KLD, {f"p{i}": "" for i in range(prompts)})
    made = link(found, (1.0, after), target("phone"))
    assert (made.passed, made.prompts) == (passed, prompts)
    gates = without_clock(RecipeGates(), target("phone"), 1.0, [made], [], 1)
    failed = failure(gates)
    assert (failed is None) is passed
    if failed:
        assert failed[0] == "aarch64"
