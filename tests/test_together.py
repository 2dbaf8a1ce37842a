"""Training in two processes: the same loss as in one, whatever is learnt; and what deaths leave."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import KILL, Dying, run_dying
from tiny import dataset_in, dataset_targets, student_in, tiny_dataset, tiny_student

from edgedistill import machine
from edgedistill.artifacts import Adapter, Dataset, Student
from edgedistill.check_specs import TextCheck
from edgedistill.distill import distill, learn
from edgedistill.distill.lesson import Pupil
from edgedistill.distill.pairs import Preference, write_pairs
from edgedistill.distill.together import WORKER
from edgedistill.errors import TrainingError
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Progress, Silent
from edgedistill.recipe import StudentSpec

PROMPT = StudentSpec(weights="tiny", max_tokens=4)
CHECK = TextCheck(kind="exact")
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


def run(
    student: Student,
    dataset: Dataset,
    out: Path,
    spec: DistillSpec,
    progress: Progress | None = None,
) -> Adapter:
    return distill(dataset, student, PROMPT, spec, CHECK, out, progress or Silent())


def in_two(spec: DistillSpec) -> DistillSpec:
    return spec.model_copy(update={"processes": 2})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=7)  # the last batch: one row


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "sharded"])
def spec(request: pytest.FixtureRequest) -> DistillSpec:
    return in_two(SPEC.model_copy(update={"shard": request.param}))


@pytest.fixture(scope="module")
def unbroken(
    student: Student, dataset: Dataset, spec: DistillSpec, tmp_path_factory: pytest.TempPathFactory
) -> Adapter:
    return run(student, dataset, tmp_path_factory.mktemp("unbroken"), spec)


def losses(folder: Path) -> list[float]:
    points = json.loads((folder / "training.json").read_text("utf-8"))
    return [point["loss"] for point in points]


def facts(adapter: Adapter) -> Any:
    return json.loads((adapter.folder / "manifest.json").read_text("utf-8"))["facts"]


@NEEDS_TWO
def test_two_processes_learn_as_one_does(
    unbroken: Adapter, student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    alone = run(student, dataset, tmp_path, SPEC)
    assert facts(unbroken)["processes"] == 2
    assert losses(unbroken.folder) == pytest.approx(losses(alone.folder), abs=2e-4)


@NEEDS_TWO
def test_the_death_of_one_is_told(
    student: Student, dataset: Dataset, spec: DistillSpec, tmp_path: Path
) -> None:
    killed = threading.Thread(target=_kill_one, args=[tmp_path])
    killed.start()
    with pytest.raises(TrainingError, match=r"of 2 training processes .* ended"):
        run(student, dataset, tmp_path, spec)
    killed.join()
    assert not _processes(tmp_path)


@NEEDS_TWO
def test_all_die_with_the_build_and_it_then_ends_with_the_same_bytes(
    unbroken: Adapter, student: Student, dataset: Dataset, spec: DistillSpec, tmp_path: Path
) -> None:
    run_dying(__file__, student.folder, dataset.folder, tmp_path, spec.model_dump_json())
    limit = time.monotonic() + 60
    while left := _processes(tmp_path):
        assert time.monotonic() < limit, left
        time.sleep(0.05)
    again = run(student, dataset, tmp_path, spec)
    assert facts(again)["resumed_from_step"] >= 4
    assert again.digest == unbroken.digest


def preferences(pupil: Pupil, file: Path) -> Path:
    """A worse answer to every row but the first, each with a reference of its own."""
    told = enumerate(pupil.rows())
    pairs = [Preference(row, "none" if i else None, (-9.0 - i, -4.0)) for i, row in told]
    write_pairs(file, pairs)
    return file


@NEEDS_TWO
@pytest.mark.parametrize("taught", ["targets", "pairs"])
def test_two_processes_learn_from_more_than_text_as_one_does(
    taught: str, student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    found = []
    for spec in (SPEC, in_two(SPEC)):
        pupil, folder = Pupil(student, PROMPT, spec, CHECK, dataset), tmp_path / str(spec.processes)
        lesson: dict[str, Any] = {"targets": dataset_targets(dataset, student, PROMPT).file}
        if taught == "pairs":
            lesson = {"rows": preferences(pupil, tmp_path / "pairs.jsonl"), "pairs": True}
        folder.mkdir()
        learn(pupil.job(**lesson), folder, Silent())
        found.append(losses(folder))
    assert sum(found[0][-3:]) < sum(found[0][:3])  # the last epoch, the first
    assert found[0] == pytest.approx(found[1], abs=2e-4)


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
    assert losses(shared.folder) == pytest.approx(losses(alone.folder), abs=near)


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


def _processes(out: Path) -> list[psutil.Process]:
    """Those that train below a folder: torchrun, then its workers."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = each.cmdline()
            if WORKER in words and words[-1].startswith(str(out)):
                found.append(each)
    return sorted(found, key=lambda each: "--standalone" not in each.cmdline())


def _kill_one(out: Path) -> None:
    """As soon as there is a checkpoint to go on from."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not list(out.glob("distill-*/resume/checkpoint-*/complete")):
        time.sleep(0.005)
    os.kill(_processes(out)[-1].pid, KILL)


if __name__ == "__main__":  # the run that is killed
    *words, told = sys.argv[1:]
    places = [Path(word) for word in words]
    held = student_in(places[0]), dataset_in(places[1], 7)
    spec_ = DistillSpec.model_validate_json(told)
    run(*held, places[2], spec_, Dying("train in 2 processes", 5))
