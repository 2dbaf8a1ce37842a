"""A model file measured on this machine, and the file that keeps what was found."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Ran
from fakes import KEY, MODEL, FakeTeacher
from rich.console import Console

from edgedistill import result_tables
from edgedistill.ceilings import Ceilings
from edgedistill.check_specs import JudgeCheck, TextCheck
from edgedistill.conditions import Conditions
from edgedistill.errors import ArtifactError, RuntimeFailure, TeacherUnreachable
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.fidelity import EvalRow
from edgedistill.history import read_history
from edgedistill.load_watch import TELLS_OF_CHILDREN, Load
from edgedistill.measures import measure
from edgedistill.model_prompt import asked_model
from edgedistill.places import BEFORE_ALONE, Here
from edgedistill.progress import Silent
from edgedistill.prompts import held_out_of, prompts_of
from edgedistill.recipe import load_recipe
from edgedistill.result_file import Result, read_result, write_result, written
from edgedistill.sitting import UNJUDGED, Plan, sit
from edgedistill.student import TOKENIZER_GGUF

SAYS = "Sure"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder, says=SAYS)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mix") / "prompts.jsonl"
    lines = [
        {"id": f"p{i}", "prompt": f"the others in canoe {i}", "reference": SAYS if i else "No"}
        for i in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return file


@pytest.fixture(scope="module")
def result(model: Path, prompts: Path) -> Result:
    given, check = prompts_of(prompts, None), TextCheck(kind="exact")
    asked = asked_model(model, None, None, 8)
    return sit(asked, Plan(processes=2, runs=2, threads=1, prompts=given, check=check), Silent())


def test_every_process_and_prompt_is_in_the_figures(result: Result) -> None:
    shapes = {name: [len(group) for group in each.groups] for name, each in result.figures.items()}
    assert shapes["pp512"] == shapes["tg128"] == [2, 2]
    assert shapes["cold_start"] == shapes["peak_memory"] == [1, 1]
    assert shapes["end_to_end_p50"] == shapes["time_to_first_token_p95"] == [4, 4]
    assert shapes["inter_token_p99"] == [4 * len(SAYS)] * 2  # each token, and what ends the answer
    assert all(each.value > 0 for each in result.figures.values())
    assert result.figures["end_to_end_p50"].value > result.figures["inter_token_p50"].value


def test_answers_are_held_against_their_references(result: Result) -> None:
    assert result.likeness is not None
    assert [row["answer"] for row in result.likeness["rows"]] == [SAYS] * 4
    assert [row["gold"] for row in result.likeness["rows"]] == [False, True, True, True]
    assert result.likeness["gold"]["value"] == 0.75
    assert result.likeness["agreement"] is None  # nobody said what a teacher answers
    assert (result.likeness["unlike"], result.likeness["threw"]) == (0, {})


def test_what_the_teacher_refuses_is_asked_once_and_not_timed(model: Path, prompts: Path) -> None:
    given = prompts_of(prompts, 2)
    refused = EvalRow("r1", "the others in a canoe", "I cannot.", "", seen=False)
    plan = Plan(processes=2, runs=2, threads=1, prompts=replace(given, refused=[refused]))
    made = sit(asked_model(model, None, None, 8), plan, Silent())
    assert made.likeness is not None
    assert made.likeness["regressions"]["value"] == 1
    assert [row["answer"] for row in made.likeness["refused"]] == [SAYS]
    assert [len(group) for group in made.figures["end_to_end_p50"].groups] == [2, 2]


def test_a_judge_that_is_down_is_told_before_anything_is_measured(
    model: Path, prompts: Path
) -> None:
    check = JudgeCheck(kind="judge", model="m", base_url="http://127.0.0.1:9/v1", attempts=1)
    plan = Plan(prompts=prompts_of(prompts, None), check=check)
    with pytest.raises(TeacherUnreachable, match="no connection to the judge"):
        sit(asked_model(model, None, None, 8), plan, Silent())


def test_held_out_prompts_come_with_their_tags_and_what_is_refused(
    tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    rows = [{"id": f"p-{n}", "prompt": f"message {n}", "tags": [f"t{n % 2}"]} for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tiny.with_name("prompts.jsonl").write_text(lines, "utf-8")
    with FakeTeacher(answer=lambda p: "I can't." if p.endswith("7") else "urgent") as teacher:
        text = tiny.read_text("utf-8").replace("http://127.0.0.1:9/v1", teacher.base_url)
        text = text.replace("some-model", f"{MODEL}\n  api_key_env: A_KEY")
        tiny.write_text(text, "utf-8")
        found = held_out_of(load_recipe(tiny), None, here / "ws", Silent())
    assert [row.id for row in found.refused] == ["p-7", "p-17", "p-27", "p-37"]
    assert {row.answer for row in found.refused} == {"I can't."}
    assert found.tags["p-3"] == ("t1",)
    assert not {row.id for row in found.rows} & {row.id for row in found.refused}


def test_a_busy_machine_is_said_to_be(result: Result) -> None:
    assert result.load["busy"] == any("other work took" in note for note in result.notes)


def test_a_result_comes_back_from_its_file(result: Result, tmp_path: Path) -> None:
    write_result(result, tmp_path / "r.json")
    back = read_result(tmp_path / "r.json")
    assert json.loads(json.dumps(back.to_json())) == json.loads(json.dumps(result.to_json()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "cut off or damaged"),
        (lambda text: "[]", "is no result"),
        (lambda text: text.replace('"version": 1', '"version": 9', 1), "of version 9, and this"),
        (lambda text: text.replace('"figures"', '"figuers"', 1), "it lacks figures"),
        (lambda text: text.replace('"unit"', '"Unit"', 1), "it is damaged"),
    ],
)
def test_a_file_that_is_no_result(
    result: Result, tmp_path: Path, change: Callable[[str], str], said: str
) -> None:
    write_result(result, file := tmp_path / "r.json")
    file.write_text(change(file.read_text("utf-8")), "utf-8")
    with pytest.raises(ArtifactError, match=said):
        read_result(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        read_result(tmp_path / "r.json")


def test_a_missing_file_of_prompts(run: Callable[..., Ran], model: Path, here: Path) -> None:
    done = run("bench", str(model), "--prompts", "nope.jsonl")
    assert done.code == 1
    assert "nope.jsonl: the prompts file cannot be read" in done.err
    assert "--prompts names it, relative to the folder you are in" in done.err
    assert "recipe" not in done.err


def test_the_command(run: Callable[..., Ran], model: Path, prompts: Path, here: Path) -> None:
    words = ["--prompts", str(prompts), "--sample", "2", "--max-tokens", "8", "--repeats", "2"]
    done = run("bench", str(model), *words, "--threads", "1", "-o", "r.json")
    assert done.code == 0, done.err
    assert done.err.endswith("kept: r.json\nremembered in .edgedistill/history.jsonl\n")
    for expected in ("model, 2.5 MB", "pp512", "tokens/s", "time_to_first_token_p50", "95 %"):
        assert expected in done.out
    kept = read_result(here / "r.json")
    assert kept.token_mix is not None
    assert (kept.token_mix["prompts"], kept.settings["threads"]) == (2, 1)
    again = run("bench", str(model), "--repeats", "2", "--threads", "1", "--quiet")
    assert (again.code, again.err) == (0, "")
    (series,) = read_history(here / ".edgedistill").series
    assert [point.value for point in series.points][:1] == [kept.figures["tg128"].value]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere.gguf"], 1, "there is no such file"),
        (["."], 1, "this folder is no bundle"),
        (["x.gguf", "--out", "no/r.json"], 2, "there is no folder no; make it first"),
        (["--out", "r.json"], 2, "--out is for a MODEL, and none is given"),
        (["--max-tokens", "3"], 2, "--max-tokens is for a MODEL"),
        (["x.gguf", "--system", "hi"], 2, "--system is for answers, and needs --prompts or --rec"),
        (["x.gguf", "--worst", "1"], 2, "--worst is for answers, and needs --prompts or --recipe"),
    ],
)
def test_bad_words(
    run: Callable[..., Ran], here: Path, words: list[str], code: int, said: str
) -> None:
    done = run("bench", *words)
    assert (done.code, said in done.err) == (code, True), done.err


class Unmeasurable(Here):
    """A machine whose ceilings cannot be measured."""

    def ceilings(self, threads: int) -> Ceilings:
        raise RuntimeFailure("there is too little memory")


def test_what_was_measured_stands_without_ceilings(model: Path) -> None:
    asked = asked_model(model, None, None, None)
    found = sit(asked, Plan(processes=2, runs=1, threads=1), Silent(), Unmeasurable())
    assert found.figures["tg128"].value > 0
    assert found.roofline is None
    assert found.notes[-1] == "the device's ceilings are not known: there is too little memory"


class Uncounted(Here):
    """A system that does not tell what ended children took, as macOS and Windows do not."""

    class Watch:
        before: float | None = 0.0

        def stop(self) -> Load:
            return Load(self.before, None)

    def watch(self) -> Watch:
        return self.Watch()


def test_where_other_work_is_not_counted_a_note_says_so(model: Path, result: Result) -> None:
    asked = asked_model(model, None, None, None)
    found = sit(asked, Plan(processes=1, runs=1, threads=1), Silent(), Uncounted())
    assert found.load == {"before": 0.0, "during": None, "busy": False}
    assert BEFORE_ALONE in found.notes
    assert (BEFORE_ALONE in result.notes) != TELLS_OF_CHILDREN


class SlowlyTelling(Here):
    """A machine that takes a second to tell what it is in."""

    def conditions(self) -> Conditions:
        time.sleep(1.0)
        return super().conditions()


def test_what_the_harness_does_is_no_cold_start(model: Path, prompts: Path) -> None:
    plan = Plan(processes=1, runs=1, threads=1, prompts=prompts_of(prompts, 1))
    found = sit(asked_model(model, None, None, 8), plan, Silent(), SlowlyTelling()).figures
    assert 0 < found["cold_start"].value - found["load"].value < 1.0


def test_values_far_off_are_counted() -> None:
    groups = [[1.0, 1.01, 0.99, 1.02], [1.0, 1.01, 0.98, 9.0]]
    table = result_tables._figures({"load": vars(measure(groups, "s"))})
    assert list(table.columns[3].cells) == ["8, 1 far off"]


@pytest.mark.parametrize(
    ("groups", "unit", "span"),
    [
        ([[40.0], [41.0], [42.0]], "tokens/s", "36.0 to 46.0 tokens/s"),
        ([[0.9], [1.0], [1.1]], "s", "503\xa0ms to 1.5\xa0s"),
        ([[130.0], [131.0]], "s", "119\xa0s to 2\xa0min 22\xa0s"),
        ([[1.0], [3.0]], "s", "unknown: too few repeats"),
        ([[1.0, 2.0]], "s", "not known"),
    ],
)
def test_an_interval_and_its_unit(groups: list[list[float]], unit: str, span: str) -> None:
    figure = written(vars(measure(groups, unit)))
    assert list(result_tables._figures({"load": figure}).columns[2].cells) == [span]


def shown(result: Result, **change: Any) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(result_tables.sitting(json.loads(json.dumps(result.to_json())) | change))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_device_and_what_few_values_tell(result: Result) -> None:
    said = shown(result)
    facts = result.device
    assert f"1 thread of {facts['physical_cores']} core" in said
    assert f"{facts['os']}, llama.cpp (llama-cpp-python " in said
    assert "OPENMP" in (kernels := facts["runtime"]["kernels"]) or "REPACK" in kernels
    assert kernels not in said
    assert "two processes, so the intervals are wide: raise --repeats" in said
    assert "_p95" in said
    assert "_p99" not in said
    assert "p99 of fewer than 100 values" in said
    assert "two processes" not in shown(result, settings={**result.settings, "processes": 3})


def test_a_busy_sitting_says_so_in_its_heading(result: Result) -> None:
    assert ": busy\n" in shown(result, load={**result.load, "busy": True})
    assert ": busy\n" not in shown(result, load={**result.load, "busy": False})


def test_prompts_without_a_check_are_not_judged(model: Path, prompts: Path) -> None:
    plan = Plan(processes=2, runs=1, threads=1, prompts=prompts_of(prompts, 2))
    notes = sit(asked_model(model, None, None, 8), plan, Silent()).notes
    assert UNJUDGED in notes


def test_a_file_that_is_no_model(run: Callable[..., Ran], here: Path) -> None:
    (here / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    done = run("bench", "x.gguf")
    assert done.code == 1
    assert "x.gguf" in done.err
