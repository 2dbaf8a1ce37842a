"""Training in two processes: the same loss as in one, and the death of one is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import tiny_dataset, tiny_student

from edgedistill import machine
from edgedistill.artifacts import Adapter, Dataset, Student
from edgedistill.distill import distill
from edgedistill.distill.together import WORKER
from edgedistill.errors import TrainingError
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec, TextCheck

SPEC = DistillSpec(
    lora=LoraSpec(rank=4, alpha=8),
    batch_size=3,
    epochs=4,
    learning_rate=1e-3,
    precision="fp32",
    checkpoints=6,
    evaluations=1,
)
NEEDS_TWO = pytest.mark.skipif(machine.threads() < 2, reason="needs two cores")


def run(student: Student, dataset: Dataset, out: Path, spec: DistillSpec) -> Adapter:
    prompt, check = StudentSpec(weights="tiny", max_tokens=4), TextCheck(kind="exact")
    return distill(dataset, student, prompt, spec, check, out, Silent())


def in_two(spec: DistillSpec) -> DistillSpec:
    return spec.model_copy(update={"processes": 2})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8)


def losses(adapter: Adapter) -> list[float]:
    points = json.loads((adapter.folder / "training.json").read_text("utf-8"))
    return [point["loss"] for point in points]


def facts(adapter: Adapter) -> dict[str, Any]:
    return json.loads((adapter.folder / "manifest.json").read_text("utf-8"))["facts"]


@NEEDS_TWO
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_learn_as_one_does_and_the_death_of_one_is_told(
    student: Student, dataset: Dataset, tmp_path: Path, shard: bool
) -> None:
    spec = SPEC.model_copy(update={"shard": shard})
    alone = run(student, dataset, tmp_path / "one", spec)
    out, killed = tmp_path / "two", threading.Thread(target=_kill_one, args=[tmp_path / "two"])
    killed.start()
    with pytest.raises(TrainingError, match=r"of 2 training processes .* ended"):
        run(student, dataset, out, in_two(spec))
    killed.join()
    assert not _workers()
    again = run(student, dataset, out, in_two(spec))
    assert facts(again)["processes"] == 2
    assert facts(again)["resumed_from_step"] > 0
    assert losses(again) == pytest.approx(losses(alone), abs=2e-4)


@NEEDS_TWO
@pytest.mark.parametrize(
    "changes", [{"tuning": "dora", "gradient_checkpointing": "on"}, {"precision": "bf16"}], ids=str
)
def test_frozen_weights_in_shares_teach_the_same(
    student: Student, dataset: Dataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = SPEC.model_copy(update={"epochs": 2, **changes})
    alone = run(student, dataset, tmp_path / "one", spec)
    shared = run(
        student, dataset, tmp_path / "two", in_two(spec.model_copy(update={"shard": True}))
    )
    assert facts(shared)["weight_bytes"] < 0.8 * facts(alone)["weight_bytes"]
    near = 2e-4 if spec.precision == "fp32" else 2e-2
    assert losses(shared) == pytest.approx(losses(alone), abs=near)


@NEEDS_TWO
def test_what_a_process_refuses_is_told(student: Student, dataset: Dataset, tmp_path: Path) -> None:
    wide = in_two(SPEC.model_copy(update={"lora": LoraSpec(rank=512)}))
    with pytest.raises(TrainingError, match=r"the rank is 512, and .* is only \d+ wide"):
        run(student, dataset, tmp_path, wide)


def test_more_processes_than_places_are_refused(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="processes is 1000"):
        run(student, dataset, tmp_path, SPEC.model_copy(update={"processes": 1000}))


def _workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [
        each for each in found if WORKER in each.cmdline() and "--standalone" not in each.cmdline()
    ]


def _kill_one(out: Path) -> None:
    """As soon as there is a checkpoint to go on from."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not list(out.glob("distill-*/resume/checkpoint-*/complete")):
        time.sleep(0.005)
    os.kill(_workers()[-1].pid, getattr(signal, "SIGKILL", signal.SIGTERM))
