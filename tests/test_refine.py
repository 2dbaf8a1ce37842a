"""On-policy rounds: what is learnt from whom, when they stop, and what they may cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import KEY, MODEL, Dying, FakeTeacher, run_dying
from tiny import dataset_in, student_in, tiny_dataset, tiny_student

from edgedistill.artifacts import Adapter, Dataset, Student, load_finished
from edgedistill.check_specs import TextCheck
from edgedistill.distill import distill
from edgedistill.distill.feedback import REVIEW, Desk
from edgedistill.distill.lesson import Pupil, validation_agreement
from edgedistill.distill.refine import refine
from edgedistill.methods import DistillSpec, LoraSpec, OnPolicySpec
from edgedistill.progress import Progress, Silent
from edgedistill.recipe import ApiTeacher, CollectSpec, CurateSpec, StudentSpec

PROMPT = StudentSpec(weights="tiny", max_tokens=6)
CHECK = TextCheck(kind="exact")
SPEC = DistillSpec(
    lora=LoraSpec(rank=8, alpha=16), batch_size=4, epochs=2, learning_rate=5e-3, precision="fp32",
    evaluations=1, checkpoints=3,
)  # fmt: skip
ROUNDS = OnPolicySpec(rounds=1, samples=2, learning_rate=2e-3, epochs=2, temperature=1.0)
KILLED = ROUNDS.model_copy(update={"samples": 16, "epochs": 4})
ANSWERS = ("the one", "thin")


@dataclass
class Notes(Silent):
    said: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset"), rows=8, answers=ANSWERS)


@pytest.fixture(scope="module")
def start(student: Student, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    out = tmp_path_factory.mktemp("start")
    return distill(dataset, student, PROMPT, SPEC, CHECK, out, Silent())


@pytest.fixture(scope="module")
def able(student: Student, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """It is right now and then, which `start` is not."""
    spec, out = SPEC.model_copy(update={"epochs": 8}), tmp_path_factory.mktemp("able")
    return distill(dataset, student, PROMPT, spec, CHECK, out, Silent())


@pytest.fixture(scope="module")
def teacher() -> Iterator[FakeTeacher]:
    """Judges the teacher's answers better wherever they stand, and prefers "the on"."""

    def answer(asked: str) -> str:
        if asked == REVIEW:
            return "the on"
        return "A" if any(f"Answer A:\n{right}\n" in asked for right in ANSWERS) else "B"

    with pytest.MonkeyPatch.context() as patch, FakeTeacher(answer=answer) as server:
        patch.setenv("FAKE_KEY", KEY)
        yield server


def refined(
    spec: OnPolicySpec,
    start: Adapter,
    student: Student,
    dataset: Dataset,
    out: Path,
    progress: Progress,
    url: str = "http://127.0.0.1:9/v1",
) -> Adapter:
    teacher = ApiTeacher(
        kind="api", base_url=url, model=MODEL, licence="none", api_key_env="FAKE_KEY"
    )
    desk = Desk(teacher, CollectSpec(), CurateSpec(), out)
    return refine(Pupil(student, PROMPT, SPEC, CHECK, dataset), start, spec, desk, progress)


def run(
    spec: OnPolicySpec,
    start: Adapter,
    student: Student,
    dataset: Dataset,
    out: Path,
    server: FakeTeacher | None = None,
) -> tuple[Adapter, list[dict[str, Any]], list[str]]:
    """The adapter, facts of each round in order, and what was noted."""
    notes, url = Notes(), {} if server is None else {"url": server.base_url}
    made = refined(spec, start, student, dataset, out, notes, **url)
    files = sorted(out.glob("refine-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    facts = [json.loads(file.read_text("utf-8"))["facts"] for file in files]
    return made, facts, [text for text in notes.said if text.startswith("on-policy")]


def learnt(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("refine-*/learnt.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("feedback", ["check", "judge", "preferred"])
def test_disagreements_become_pairs(
    feedback: Any, start: Adapter, student: Student, dataset: Dataset, teacher: FakeTeacher,
    tmp_path: Path,
) -> None:  # fmt: skip
    spec = ROUNDS.model_copy(update={"feedback": feedback})
    made, (facts,), _ = run(spec, start, student, dataset, tmp_path, teacher)
    pairs = learnt(tmp_path)
    assert facts["answers"] == 16
    assert 0 < facts["pairs"] == len(pairs) <= facts["wrong"] <= facts["disagreements"]
    assert facts["teacher_calls"] == {"check": 0, "judge": 2, "preferred": 1}[feedback] * len(
        {each["prompt_id"] for each in told(tmp_path)} or ()
    )
    wanted = {"the on"} if feedback == "preferred" else set(ANSWERS)
    for pair in pairs:
        assert pair["row"]["answer"] in wanted
        assert pair["rejected"] not in (pair["row"]["answer"], "")
        assert max(pair["reference"]) < 0
    before = validation_agreement(start.folder)
    assert facts["agreement_before"] == before
    assert facts["kept"] == (facts["agreement"] > before)
    assert (made == start) != facts["kept"]


def told(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("refine-*/feedback.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("feedback", ["check", "judge", "preferred"])
def test_right_answers_become_text(
    feedback: Any, able: Adapter, student: Student, dataset: Dataset, teacher: FakeTeacher,
    tmp_path: Path,
) -> None:  # fmt: skip
    spec = ROUNDS.model_copy(update={"feedback": feedback, "learn": "rejection", "samples": 4})
    _, (facts,), _ = run(spec, able, student, dataset, tmp_path, teacher)
    rows = learnt(tmp_path)
    own = [row for row in rows if "#" in row["id"]]
    assert len(own) == facts["own_answers_learnt"] > 0
    assert {row["id"].partition("#")[0] for row in rows} == {f"train-{i}" for i in range(8)}
    for name in {row["id"].partition("#")[0] for row in rows}:
        of = [row["weight"] for row in rows if row["id"].partition("#")[0] == name]
        assert sum(of) == pytest.approx(1.0)
    others = {row["answer"] for row in rows if "#" not in row["id"]}
    assert others <= {*ANSWERS, "the on"}
    if feedback != "preferred":
        assert others <= set(ANSWERS)
        assert {row["answer"] for row in own} <= set(ANSWERS)


def test_the_budget_ends_the_rounds_and_not_the_build(
    start: Adapter, student: Student, dataset: Dataset, teacher: FakeTeacher, tmp_path: Path
) -> None:
    spec = ROUNDS.model_copy(update={"feedback": "judge", "max_calls": 3, "rounds": 5})
    before = teacher.calls
    _, rounds, said = run(spec, start, student, dataset, tmp_path, teacher)
    assert teacher.calls - before <= 3
    assert sum(facts["teacher_calls"] for facts in rounds) == 2
    assert rounds[0]["prompts_beyond_max_calls"] > 0
    assert "prompts beyond distill.on_policy.max_calls" in said[0]
    assert len(rounds) == 1
    none = spec.model_copy(update={"max_calls": 1})
    made, rounds, said = run(none, start, student, dataset, tmp_path / "none", teacher)
    assert (made, rounds) == (start, [])
    assert "1 of 1 teacher calls are left, no more rounds" in said[0]


def test_rounds_stop_when_agreement_does_not_rise(
    start: Adapter, student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    spec = ROUNDS.model_copy(update={"rounds": 6, "learning_rate": 1e-9})
    made, rounds, said = run(spec, start, student, dataset, tmp_path)
    (facts,) = rounds
    assert facts["agreement"] == facts["agreement_before"]
    assert not facts["kept"]
    assert "not kept, and the last" in said[0]
    assert made == start


def test_rounds_go_on_from_the_best_and_a_second_run_reuses_them(
    start: Adapter, student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    spec = ROUNDS.model_copy(update={"rounds": 3, "samples": 4})
    made, rounds, said = run(spec, start, student, dataset, tmp_path)
    reached = [validation_agreement(start.folder), *(facts["agreement"] for facts in rounds)]
    assert reached[1] > reached[0], "the first round teaches this student something"
    assert all(facts["kept"] for facts in rounds[:-1])
    assert validation_agreement(made.folder) == max(reached)
    assert [facts["agreement_before"] for facts in rounds] == reached[:-1]
    again, same, unsaid = run(spec, start, student, dataset, tmp_path)
    assert (again, same, unsaid) == (made, rounds, [])
    assert len(said) == len(rounds)


def test_where_nothing_is_wrong_nothing_is_trained(
    start: Adapter, student: Student, dataset: Dataset, tmp_path: Path
) -> None:
    """A check that takes any answer for the teacher's."""
    lenient = TextCheck(kind="number", tolerance=1.0)
    numbers = tiny_dataset(tmp_path / "data", rows=8, answers=("12",))
    learned = distill(numbers, student, PROMPT, SPEC.model_copy(update={"epochs": 12}), lenient,
                      tmp_path, Silent())  # fmt: skip
    pupil = Pupil(student, PROMPT, SPEC, lenient, numbers)
    held = ApiTeacher(kind="api", base_url="http://127.0.0.1:9/v1", model=MODEL, licence="none")
    desk, notes = Desk(held, CollectSpec(), CurateSpec(), tmp_path), Notes()
    cold = ROUNDS.model_copy(update={"temperature": 0.01})
    assert refine(pupil, learned, cold, desk, notes) == learned
    assert "nothing to learn, and the last" in notes.said[0]


@pytest.fixture(scope="module")
def unbroken(
    start: Adapter, student: Student, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Adapter:
    out = tmp_path_factory.mktemp("unbroken")
    return refined(KILLED, start, student, dataset, out, Silent())


@pytest.mark.parametrize(
    ("label", "at", "batches"), [("round 1: answers of its own", 64, 1), ("round 1", 4, 2)]
)
def test_killed_in_a_round_it_ends_with_the_same_bytes(
    label: str, at: int, batches: int, unbroken: Adapter, start: Adapter, student: Student,
    dataset: Dataset, tmp_path: Path,
) -> None:  # fmt: skip
    run_dying(__file__, start.folder, student.folder, dataset.folder, tmp_path, label, at)
    assert not list(tmp_path.glob("refine-*/manifest.json"))
    (drawn,) = tmp_path.glob("refine-*/resume/drawn.jsonl")
    assert len(drawn.read_bytes().splitlines()) == batches  # of 2, with 64 answers each
    again, (facts,), _ = run(KILLED, start, student, dataset, tmp_path)
    assert (facts["resumed_from_step"] > 0) == (label == "round 1")
    assert facts["kept"], "else both would be the adapter that they began with"
    assert again.digest == unbroken.digest


if __name__ == "__main__":  # the run that is killed
    *words, label, at = sys.argv[1:]
    places = [Path(word) for word in words]
    done = load_finished(places[0], reused=True)
    assert done is not None
    begun = Adapter(done.folder, done.digest, done.facts["steps"])
    held = student_in(places[1]), dataset_in(places[2], 8)
    refined(KILLED, begun, *held, places[3], Dying(label, float(at)))
