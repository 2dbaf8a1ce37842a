"""Supervision, batches, and a run that a kill does not change."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import Dying, run_dying
from tiny import STOP, dataset_in, dataset_targets, student_in, tiny_dataset, tiny_student
from tiny_families import family_student

from edgedistill.artifacts import Adapter, Dataset, Student
from edgedistill.check_specs import TextCheck
from edgedistill.distill import distill, learn
from edgedistill.distill.lesson import Job
from edgedistill.errors import DatasetError, MissingTool, TrainingError
from edgedistill.fidelity import EvalRow
from edgedistill.merge import merge, require_fp32
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Progress, Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.torch_runtime import TorchModel
from edgedistill.training.data import (
    IGNORED,
    TrainingRow,
    collate,
    plan_batches,
    split_batch,
    training_rows,
)

PROMPT = StudentSpec(weights="tiny", max_tokens=4)
SPEC = DistillSpec(
    lora=LoraSpec(rank=4, alpha=8, dropout=0.1),  # dropout: the RNG must survive a resume
    batch_size=2,
    epochs=4,
    learning_rate=1e-3,
    precision="fp32",
    checkpoints=8,
    evaluations=2,
)
CHECK = TextCheck(kind="exact")
KILLED: dict[str, dict[str, Any]] = {
    "sft": {},
    "logits": {"method": "logits"},
    "full": {"tuning": "full", "learning_rate": 3e-4},
}


def rows(*lengths: int) -> list[TrainingRow]:
    return [TrainingRow(f"r{i}", (7,) * (n - 2), (8, STOP)) for i, n in enumerate(lengths)]


def run(
    student: Student,
    dataset: Dataset,
    out: Path,
    spec: DistillSpec = SPEC,
    progress: Progress | None = None,
) -> Adapter:
    taught = dataset_targets(dataset, student, PROMPT) if spec.method == "logits" else None
    return distill(dataset, student, PROMPT, spec, CHECK, out, progress or Silent(), taught)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8)


@pytest.fixture(scope="module")
def unbroken(
    student: Student, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Adapter:
    return run(student, dataset, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    ("answer", "longest", "said"),
    [
        ("fine", 8, r"max_length \(8\)"),
        ("", 200, "its answer is empty"),
        ("one<|im_end|>two", 200, "stop token before its end"),
    ],
)
def test_row_that_breaks_supervision_is_refused(
    student: Student, answer: str, longest: int, said: str
) -> None:
    row = EvalRow("row-7", "a question", answer, "p", True)
    with pytest.raises(TrainingError, match=said) as caught:
        training_rows([row], StudentPrompt(student.folder, PROMPT), longest)
    assert "row-7" in str(caught.value)


def test_a_row_beyond_the_students_context_ends_the_run(dataset: Dataset, tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "llama", max_position_embeddings=32)
    with pytest.raises(TrainingError, match="the student's context 32"):
        run(student, dataset, tmp_path)


def test_no_rows(student: Student) -> None:
    with pytest.raises(DatasetError):
        training_rows([], StudentPrompt(student.folder, PROMPT), 100)


def test_only_answer_and_stop_token_are_supervised() -> None:
    batch = collate([rows(5, 3)], pad_id=STOP)
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, IGNORED, 8, STOP],
        [IGNORED, 8, STOP, IGNORED, IGNORED],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own() -> None:
    made = rows(*range(3, 43))
    batches = plan_batches(made, 4, 2, seed=3)
    epochs = [[row.id for batch in half for row in batch] for half in (batches[:10], batches[10:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.id for row in made)
    assert epochs[0] != epochs[1]
    assert batches == plan_batches(made, 4, 2, seed=3)
    assert batches != plan_batches(made, 4, 2, seed=4)


def test_half_an_epoch_is_half_the_batches() -> None:
    assert len(plan_batches(rows(*[5] * 40), 4, 0.5, seed=0)) == 5


def test_rows_of_a_batch_are_about_as_long() -> None:
    made = rows(*(3 + i % 60 for i in range(512)))
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in plan_batches(made, 16, 1, 0)]
    assert sum(spread) / len(spread) < 15


def test_parts_of_a_batch_cover_it_and_are_cut_to_their_longest_row() -> None:
    batch = collate([rows(4, 5, 6, 10)], pad_id=STOP)
    parts = split_batch(batch, tokens=20)
    assert [tuple(part["labels"].shape) for part in parts] == [(2, 5), (2, 10)]
    assert sum(int((part["labels"] != IGNORED).sum()) for part in parts) == 8


def test_adapter_holds_what_the_contract_says(unbroken: Adapter, student: Student) -> None:
    files = {path.name for path in unbroken.folder.iterdir()}
    assert files == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "training.json",
        "manifest.json",
    }
    config = json.loads((unbroken.folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == student.name
    assert "lm_head" not in config["target_modules"]
    points = json.loads((unbroken.folder / "training.json").read_text("utf-8"))
    assert [point["step"] for point in points] == list(range(1, 17))
    measured = [p["step"] for p in points if p["validation_agreement"] is not None]
    assert measured == [8, 16]
    assert points[-1]["loss"] < points[0]["loss"]


@pytest.mark.parametrize("case", KILLED)
def test_killed_run_ends_with_the_same_bytes(
    unbroken: Adapter, student: Student, dataset: Dataset, tmp_path: Path, case: str
) -> None:
    spec, out = SPEC.model_copy(update=KILLED[case]), tmp_path / "out"
    once = unbroken if spec == SPEC else run(student, dataset, tmp_path / "once", spec)
    run_dying(__file__, student.folder, dataset.folder, out, case)
    assert not list(out.glob("distill-*/manifest.json"))
    again = run(student, dataset, out, spec)
    facts = json.loads((again.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["resumed_from_step"] == 10  # killed behind 11; every second has a checkpoint
    assert again.digest == once.digest


def test_torn_checkpoint_is_never_used(tmp_path: Path) -> None:
    from edgedistill.training.history import COMPLETE, last_complete

    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


@pytest.mark.parametrize(
    ("agreements", "chosen"),
    [((0.5, 0.8, 0.8), 3), ((0.5, 0.9, 0.8), 3), ((0.95, 1.0, 0.8), 2), ((1.0, 1.0, 0.8), 2)],
)
def test_earlier_adapter_only_when_better_by_more_than_one_prompt(
    agreements: tuple[float, ...], chosen: int
) -> None:
    from edgedistill.distill import choose_step
    from edgedistill.results import TrainingPoint

    points = [TrainingPoint(i + 1, 1.0, 0.1, 0.1, value) for i, value in enumerate(agreements)]
    assert choose_step(points, validation_rows=10) == chosen


def test_loss_that_is_not_finite_ends_the_run(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="the loss is"):
        run(student, dataset, tmp_path, SPEC.model_copy(update={"learning_rate": 1e30}))


def test_a_loss_that_rises_ends_the_run_and_keeps_what_was_good(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    apt = run(student, dataset, tmp_path, SPEC.model_copy(update={"epochs": 8}))
    wild = {"learning_rate": 10.0, "warmup_share": 0.9, "epochs": 12, "evaluations": 12}
    job = Job(
        student=student,
        prompt=PROMPT,
        spec=SPEC.model_copy(update=wild),
        check=CHECK,
        rows=dataset.folder / "train.jsonl",
        validation=dataset.folder / "validation.jsonl",
        start=apt.folder,
    )
    with pytest.raises(TrainingError, match="training diverges: the loss was") as caught:
        learn(job, tmp_path / "made", Silent())
    kept = Path(str(caught.value).split("the last adapter before that is ")[1].splitlines()[0])
    assert (kept / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("tuning", ["dora", "rslora", "qlora", "full"])
def test_each_way_of_tuning_learns_and_merges(
    student: Student, dataset: Dataset, tmp_path: Path, tuning: Any
) -> None:
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    rate = 3e-4 if tuning == "full" else 2e-3
    adapter = run(
        student,
        dataset,
        tmp_path,
        SPEC.model_copy(update={"tuning": tuning, "learning_rate": rate}),
    )
    points = json.loads((adapter.folder / "training.json").read_text("utf-8"))
    assert points[-1]["loss"] < 0.9 * points[0]["loss"]
    facts = json.loads((adapter.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert ("validation_agreement_unrounded" in facts) == (tuning == "qlora")
    merged = merge(adapter, student, tmp_path, Silent())
    require_fp32(merged.folder)
    ids = [5, 40, 41, 90, 17, 60, 2]
    (adapted,) = TorchModel(student.folder, adapter.folder).logits([(ids, 3)])
    (after,) = TorchModel(merged.folder).logits([(ids, 3)])
    assert abs(adapted - after).max() < 1e-3


def test_a_tracker_is_told_of_every_step(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adapter = run(
        student, dataset, tmp_path, SPEC.model_copy(update={"report_to": ("tensorboard",)})
    )
    told = EventAccumulator(str(tmp_path / "runs" / adapter.folder.name))
    told.Reload()
    assert len(told.Scalars("train/loss")) == adapter.steps
    assert len(told.Scalars("train/validation_agreement")) == SPEC.evaluations


def test_a_tracker_that_is_not_installed_is_refused(
    student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(MissingTool, match="the package wandb is not installed"):
        run(student, dataset, tmp_path, SPEC.model_copy(update={"report_to": ("wandb",)}))


def test_precision_is_measured_once(student: Student, dataset: Dataset, tmp_path: Path) -> None:
    auto = SPEC.model_copy(update={"precision": "auto", "epochs": 0.25})
    run(student, dataset, tmp_path, auto)
    measured = next(tmp_path.glob("precision-*/precision.json"))
    before = measured.stat().st_mtime_ns
    found: dict[str, Any] = json.loads(measured.read_text("utf-8"))
    assert found["chosen"] == ("bf16" if found["bf16"] > found["fp32"] else "fp32")
    run(student, dataset, tmp_path, auto.model_copy(update={"epochs": 0.5}))
    assert measured.stat().st_mtime_ns == before


if __name__ == "__main__":  # the run that is killed
    *words, name = sys.argv[1:]
    places = [Path(word) for word in words]
    held = student_in(places[0]), dataset_in(places[1], 8)
    run(*held, places[2], SPEC.model_copy(update=KILLED[name]), Dying("train", 11))
