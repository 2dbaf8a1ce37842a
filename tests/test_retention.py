from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran

from edgedistill.errors import ArtifactError, UsageError
from edgedistill.evaluate.evaluation import Evaluation, Score, TaskResult, write_evaluation
from edgedistill.measures import NORMAL95
from edgedistill.retention import PAIRED, PROPAGATED, Kept, retention

Run = Callable[..., Ran]


def task(flags: Sequence[bool], name: str = "quiz", **changes: Any) -> TaskResult:
    n, value = len(flags), sum(flags) / len(flags)
    rows = [{"document": f"d{at}", "acc": float(flag)} for at, flag in enumerate(flags)]
    error = math.sqrt(value * (1 - value) / (n - 1))
    fields = {"version": "1", "config": "c", "num_fewshot": 0, "rows": rows}
    scores = {"acc": Score(value, error), "acc_norm": Score(0.5, 0.01)}
    return TaskResult(**{"name": name, **fields, "scores": scores, **changes})


def write(
    folder: Path,
    name: str,
    *tasks: TaskResult,
    parameters: int | None = 10**8,
    runtime: str | None = "gguf",
    **settings: Any,
) -> Path:
    model = {"name": name, "sha256": name, "parameters": parameters, "runtime": runtime}
    file = folder / f"{name}.json"
    write_evaluation(Evaluation("2026-01-01", "0", model, {}, settings, tasks), file)
    return file


def flags(share: float, n: int = 400, seed: int = 0) -> list[bool]:
    chance = random.Random(seed)
    made = [at < share * n for at in range(n)]
    chance.shuffle(made)
    return made


def kept(folder: Path, teacher: TaskResult, student: TaskResult, **more: Any) -> Kept:
    files = [write(folder, "student", student)]
    found = retention(files, write(folder, "teacher", teacher), **more).rows[0].students[0]
    assert found is not None
    return found


def test_retention_is_the_share_of_the_teachers_score(tmp_path: Path) -> None:
    found = kept(tmp_path, task(flags(0.8)), task(flags(0.6, seed=1)))
    assert found.retention == pytest.approx(0.75)
    assert found.interval == PAIRED
    assert found.low is not None
    assert found.high is not None
    assert 0.6 < found.low < 0.75 < found.high < 0.9


def test_documents_that_are_hard_for_both_do_not_widen_the_interval(tmp_path: Path) -> None:
    teacher = flags(0.8)
    alike = [flag and at % 4 > 0 for at, flag in enumerate(teacher)]
    unlike = flags(sum(alike) / len(alike), seed=5)
    widths = []
    for student in (alike, unlike):
        found = kept(tmp_path, task(teacher), task(student))
        assert found.low is not None
        assert found.high is not None
        widths.append(found.high - found.low)
    assert widths[0] < 0.8 * widths[1]


def test_the_interval_covers_what_is_true(tmp_path: Path) -> None:
    """Of 100 pairs of models that are right on 80 and 60 % of all documents."""
    covered = 0
    for seed in range(100):
        chance = random.Random(seed)
        teacher = [chance.random() < 0.8 for _ in range(200)]
        student = [chance.random() < 0.6 for _ in range(200)]
        found = kept(tmp_path, task(teacher), task(student))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.75 <= found.high
    assert covered >= 88  # of 95 that are meant: less than this in 1 of 250 cases


def test_a_teacher_that_was_measured_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path, "student", task(flags(0.6)))
    table = retention([file], None, ["quiz=0.8:0.01"], 7e9, "big")
    found = table.rows[0].students[0]
    assert found is not None
    error = math.hypot(found.stderr / 0.6, 0.01 / 0.8)  # type: ignore[operator]
    assert found.interval == PROPAGATED
    assert found.retention == pytest.approx(0.75)
    assert found.high == pytest.approx(0.75 * math.exp(NORMAL95 * error))
    assert (table.teacher, table.students[0].ratio) == ("big", 70)


def test_less_is_better_turns_the_ratio_round(tmp_path: Path) -> None:
    scores = [{"ppl": Score(value, 0.1, higher_is_better=False)} for value in (8.0, 10.0)]
    teacher, student = (task(flags(0.5), scores=each) for each in scores)
    found = kept(tmp_path, teacher, student)
    assert found.retention == pytest.approx(0.8)
    assert found.interval == PROPAGATED  # no mean of its documents'


def test_a_teacher_at_zero_has_nothing_to_keep(tmp_path: Path) -> None:
    found = kept(tmp_path, task([False] * 9), task([True] * 9))
    assert (found.retention, found.low, found.interval) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "2"}, "task version 1, and 2"),
        ({"num_fewshot": 5}, "examples in a prompt 0, and 5"),
        ({"config": "other"}, "digest of the task"),
        ({"rows": [{"document": "z", "acc": 1.0}]}, "documents 400, and 1"),
    ],
)
def test_other_questions_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said) as raised:
        kept(tmp_path, task(flags(0.8)), task(flags(0.6), **changes))
    assert raised.value.where == str(tmp_path / "student.json")


@pytest.mark.parametrize(
    ("theirs", "ours", "differ"),
    [
        ({"chat": True}, {"chat": False}, "--chat yes, and no"),
        ({"chat": True}, {"chat": True, "system": "Be brief."}, "--system none, and 'Be brief.'"),
        ({"chat": True}, {"chat": True}, None),
        ({"chat": False, "runtime": None}, {"chat": True}, None),  # completions from elsewhere
    ],
)
def test_who_was_asked_otherwise_is_told(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], differ: str | None
) -> None:
    teacher = write(tmp_path, "big", task(flags(0.8)), **theirs)
    student = write(tmp_path, "small", task(flags(0.6)), **ours)
    told = f"small was asked otherwise than big: {differ}; scores differ by that, too"
    assert retention([student], teacher).to_json()["notes"] == ([] if differ is None else [told])


def test_students_that_were_asked_otherwise_than_each_other(run: Run, tmp_path: Path) -> None:
    one = write(tmp_path, "one", task(flags(0.8)), chat=True)
    two = write(tmp_path, "two", task(flags(0.6)), chat=False)
    words = ["retention", str(one), str(two), "--teacher-score", "quiz=0.8:0.01", "--format"]
    for shape in ("table", "json"):
        told = " ".join(run(*words, shape).out.split())
        assert "two was asked otherwise than one: --chat yes, and no" in told


def test_a_metric_by_name(tmp_path: Path) -> None:
    found = kept(tmp_path, task(flags(0.8)), task(flags(0.6)), metric="acc_norm")
    assert found.retention == 1
    with pytest.raises(UsageError, match="no metric 'ac'"):
        kept(tmp_path, task(flags(0.8)), task(flags(0.6)), metric="ac")


def test_several_students_and_a_task_that_one_was_not_asked(run: Run, tmp_path: Path) -> None:
    teacher = write(tmp_path, "big", task(flags(0.8)), task(flags(0.5), "hard"), parameters=10**9)
    small = write(tmp_path, "small", task(flags(0.6)), task(flags(0.4), "hard"))
    other = write(tmp_path, "other", task(flags(0.7)), parameters=None)
    words = ["retention", str(small), str(other), "--teacher", str(teacher), "--format"]
    ran = run(*words, "markdown")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "| task | metric | big (1.0B) | small (100M, 10 times smaller) | other |"
    assert lines[3].startswith("| hard | acc | 0.500 ± 0.025 | 0.400 ± 0.025, 80% [")
    assert lines[3].endswith("| - |")
    value = json.loads(run(*words, "json").out)
    assert value["rows"][0]["students"][0]["retention"] == pytest.approx(0.75)
    table = run(*words, "csv").out.splitlines()
    assert len(table) == 4
    assert table[1].startswith("quiz,acc,big,0.8,")
    assert "retention" in run(*words, "table").out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is no teacher"),
        (["--teacher-score", "quiz"], 2, "is not read"),
        (["--teacher-score", "quiz=nan"], 2, "is not read"),
        (["--teacher-score", "other=0.5"], 2, "the teacher's tasks are other"),
        (["--teacher", "gone.json"], 1, "gone.json: it cannot be read"),
    ],
)
def test_what_cannot_be_laid_out(
    run: Run, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    ran = run("retention", str(write(tmp_path, "student", task(flags(0.6)))), *words)
    assert ran.code == code
    assert said in ran.err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "incomplete, cut off or damaged"),
        (lambda text: '{"kind": "edgedistill-result"}', "it is no evaluation"),
        (lambda text: text.replace('"version": 1', '"version": 9', 1), "of version 9"),
        (lambda text: text.replace('"value": 0.6', '"value": "high"'), "is no number"),
        (lambda text: text.replace('"document"', '"dokument"'), "has no document"),
        (lambda text: text.replace('"scores"', '"skores"'), "a task lacks scores"),
        (lambda text: text.replace('"tasks"', '"tusks"'), "it lacks tasks"),
    ],
)
def test_a_damaged_file_is_refused(
    run: Run, tmp_path: Path, damage: Callable[[str], str], said: str
) -> None:
    file = write(tmp_path, "student", task(flags(0.6)))
    file.write_text(damage(file.read_text("utf-8")), "utf-8")
    ran = run("retention", str(file), "--teacher-score", "quiz=0.8")
    assert ran.code == 1
    assert said in ran.err
