from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import tiny
from conftest import Ran

from edgedistill.errors import DatasetError, UsageError
from edgedistill.evaluate import Plan, evaluate, unheld
from edgedistill.evaluate.code import pass_at_k, read_exercises
from edgedistill.evaluate.evaluation import Evaluation
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.student import TOKENIZER_GGUF

Run = Callable[..., Ran]
EXERCISES = [
    {"task_id": "T/0", "prompt": "def twice(x):\n    '''Two times x.'''\n",
     "entry_point": "twice", "canonical_solution": "    return 2 * x\n",
     "test": "def check(candidate):\n    assert candidate(2) == 4\n"},
    {"task_id": "T/1", "prompt": "def last(items):\n    '''The last of them.'''\n",
     "entry_point": "last", "canonical_solution": "    return items[-1]\n",
     "test": "def check(candidate):\n    assert candidate([1, 2]) == 2\n"},
]  # fmt: skip


def write_lines(file: Path, *lines: object) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def scored(folder: Path, *completions: tuple[str, str]) -> Evaluation:
    exercises = write_lines(folder / "tasks.jsonl", *EXERCISES)
    lines = [{"task_id": name, "completion": text} for name, text in completions]
    made = write_lines(folder / "made.jsonl", *lines)
    return evaluate(made, Plan((f"humaneval:{exercises}",)), folder, Silent())


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (4, 4, 2), (6, 0, 3)])
def test_pass_at_k_is_the_mean_over_all_draws(samples: int, passed: int, k: int) -> None:
    flags = [True] * passed + [False] * (samples - passed)
    assert pass_at_k(samples, passed, k) == pytest.approx(fmean(map(any, combinations(flags, k))))


def test_the_solutions_that_belong_to_it_pass(tmp_path: Path) -> None:
    solutions = [(each["task_id"], each["canonical_solution"]) for each in EXERCISES]
    done = scored(tmp_path, *solutions)
    assert done.tasks[0].name == "humaneval:tasks"
    assert done.tasks[0].scores["pass@1"].value == 1
    assert "audit" in done.settings["sandbox"]
    assert done.notes == unheld(done.settings["sandbox"])


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (["audit", "landlock", "limits", "seccomp"], None),
        (["audit", "limits", "seccomp"], "your files (no Landlock) were kept"),
        (["audit", "landlock"], "processes, signals and sockets (no seccomp) were kept"),
        (
            ["audit"],
            "your files (no Landlock) and processes, signals and sockets (no seccomp) were",
        ),
    ],
)
def test_what_the_system_did_not_hold_is_told(held: list[str], said: str | None) -> None:
    assert [note.startswith(said or "?") for note in unheld(held)] == [True] * (said is not None)


def test_wrong_and_leaving_programs_fail_and_say_why(tmp_path: Path) -> None:
    done = scored(tmp_path, ("T/0", "    return x\n"), ("T/1", "    import sys; sys.exit(0)\n"))
    assert done.tasks[0].scores["pass@1"].value == 0
    failed = [row["failed"][0] for row in done.tasks[0].rows]
    assert [text.split(":")[0] for text in failed] == ["AssertionError", "SystemExit"]


def test_several_samples_give_pass_at_more(tmp_path: Path) -> None:
    right, wrong = [("T/0", "    return 2 * x\n")] * 3, [("T/0", "    return x\n")] * 9
    done = scored(tmp_path, *right, *wrong, *[("T/1", "    return items[-1]\n")] * 12)
    values = {name: score.value for name, score in done.tasks[0].scores.items()}
    assert values == pytest.approx({"pass@1": (3 / 12 + 1) / 2, "pass@10": 1.0})


def test_a_model_writes_the_functions(tmp_path: Path) -> None:
    exercises = write_lines(tmp_path / "tasks.jsonl", EXERCISES[0])
    student = tiny.tiny_student(tmp_path / "student", says="    return 2*x"[4:]).folder
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    model = tmp_path / "model.gguf"
    write_gguf(student, student / TOKENIZER_GGUF, model, made_from, Silent())
    plan = Plan((f"humaneval:{exercises}",), threads=1)
    done = evaluate(model, plan, tmp_path / "ws", Silent())
    # It says `return 2*x`, without an indent: what Python says of that is kept.
    assert done.tasks[0].rows[0]["failed"][0].startswith(("IndentationError", "SyntaxError"))
    assert done.tasks[0].scores["pass@1"].value == 0
    assert done.settings["lm_eval"] is None
    chat = evaluate(model, Plan(plan.tasks, chat=True, threads=1), tmp_path / "ws", Silent())
    # Another request than without its template.
    assert not any("earlier run" in note for note in chat.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{broken\n", "no JSON object"),
        ("[1]\n", "no JSON object"),
        ('{"task_id": "a", "prompt": "b"}\n', "no text entry_point, test"),
        ("\n", "no line"),
        (json.dumps(EXERCISES[0]) + "\n" + json.dumps(EXERCISES[0]), "stands in it"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tasks.jsonl").write_text(text, "utf-8")
    with pytest.raises(DatasetError, match=said):
        read_exercises(tmp_path / "tasks.jsonl")


def test_completions_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="1 exercises have no completion, the first is T/1"):
        scored(tmp_path, ("T/0", "    return 2 * x\n"))
    with pytest.raises(UsageError, match="scored on one file of exercises"):
        evaluate(tmp_path / "made.jsonl", Plan(("arc_easy",)), tmp_path, Silent())


def test_the_command_scores_completions(run: Run, tmp_path: Path) -> None:
    exercises = write_lines(tmp_path / "tasks.jsonl", EXERCISES[0])
    line = {"task_id": "T/0", "completion": "    return x + x\n"}
    made = write_lines(tmp_path / "teacher.jsonl", line)
    ran = run("evaluate", str(made), "--tasks", f"humaneval:{exercises}")
    assert ran.code == 0, ran.err
    assert "pass@1" in ran.out
    assert "1.0000" in ran.out
    assert run("evaluate", str(made), "--tasks", "humaneval:gone.jsonl").code == 1
