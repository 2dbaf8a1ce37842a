"""The rule of benchmarks/run.py, what it refuses, and the list of the scripts beside it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill import machine
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.measures import T95, Measure, measure
from edgedistill.result_file import written

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import judging  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
import run_files  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
import side_by_side  # type: ignore[import-not-found,unused-ignore]  # noqa: E402

HERE = machine.fingerprint()
FEW = 20  # benchmarks of a run


def figure(draw: random.Random, seconds: float = 1.0, processes: int = 5) -> Measure:
    """Processes differ by 3 %, rounds by 1 %."""
    paces = [seconds * draw.gauss(1, 0.03) for _ in range(processes)]
    return measure([[pace * draw.gauss(1, 0.01) for _ in range(9)] for pace in paces], "s", "p50")


def side(seed: int, seconds: float = 1.0, processes: int = 5) -> dict[str, Measure]:
    draw = random.Random(seed)
    return {
        f"b{n}": figure(draw, seconds if n == 0 else 1.0, processes=processes) for n in range(FEW)
    }


def verdicts(seed: int, seconds: float = 1.0) -> list[str]:
    found = judging.judge(side(2 * seed, seconds), side(2 * seed + 1), one_run=True)
    return [each.verdict for each in found]


@pytest.mark.parametrize("degrees", range(1, len(T95) + 1))
def test_students_t_is_that_of_the_tables(degrees: int) -> None:
    assert judging.two_sided(T95[degrees - 1], degrees) == pytest.approx(0.05, abs=1e-4)
    assert judging.two_sided(0.0, degrees) == 1.0


def test_equal_runs_are_not_flagged_in_20_tries() -> None:
    assert {verdict for seed in range(20) for verdict in verdicts(seed)} == {judging.ALIKE}


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.25, judging.SLOWER), (0.8, judging.FASTER), (1.05, judging.ALIKE)]
)
def test_what_became_slower_or_faster_is_found(seconds: float, verdict: str) -> None:
    found = [verdicts(seed, seconds) for seed in range(10)]
    assert [each[0] for each in found] == [verdict] * 10
    assert {other for each in found for other in each[1:]} == {judging.ALIKE}


def test_runs_of_two_hours_are_told_apart_less() -> None:
    now, before = side(0, 1.25), side(1)
    apart, turns = (judging.judge(now, before, one_run=each)[0] for each in (False, True))
    assert apart.ratio == turns.ratio
    assert apart.low is not None
    assert turns.low is not None
    assert apart.low < turns.low
    assert (apart.p_value or 0) > (turns.p_value or 0)


def test_small_but_sure_is_no_regression() -> None:
    now, before = ({"b": measure([[value], [value * 1.0001]], "s", "p50")} for value in (1.05, 1.0))
    judged = judging.judge(now, before)[0]
    assert judged.p_value < 0.001
    assert judged.verdict == judging.ALIKE
    assert judging.judge(now, before, 0.01)[0].verdict == judging.SLOWER


def test_what_cannot_be_told() -> None:
    now = {**side(1), "new": figure(random.Random(3))}
    found = {
        each.name: each for each in judging.judge(now, {**side(2), "b1": side(2, 1.0, 1)["b1"]})
    }
    assert (found["new"].verdict, found["b1"].verdict) == (judging.UNTOLD, judging.UNTOLD)
    assert "no such benchmark" in found["new"].why
    assert "two processes" in found["b1"].why
    assert found["b0"].verdict == judging.ALIKE


def run_of(file: Path, made: str = "2026-03-01T10:00:00+00:00", **changes: Any) -> Path:
    told = {"made": made, "edgedistill": "0", "machine": {"cpu": "c", "fingerprint": HERE}}
    run = run_files.Run(**{**told, "commit": None, "settings": {}, "complete": True, **changes})
    run.benchmarks = side(1)
    run.write(file)
    return file


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = run_files.read_run(run_of(tmp_path / "a.json"))
    expected = {name: written(asdict(each)) for name, each in side(1).items()}
    read = {name: written(asdict(each)) for name, each in found.benchmarks.items()}
    assert json.dumps(read) == json.dumps(expected)


def test_the_newest_whole_run_of_this_machine(tmp_path: Path) -> None:
    other = {"cpu": "c", "fingerprint": "other"}
    run_of(tmp_path / "a.json", "2026-03-01T10:00:00+00:00")
    run_of(tmp_path / "b.json", "2026-03-02T10:00:00+00:00")
    run_of(tmp_path / "c.json", "2026-03-03T10:00:00+00:00", complete=False)
    run_of(tmp_path / "d.json", "2026-03-04T10:00:00+00:00", machine=other)
    assert run_files.find_baseline(tmp_path, HERE)[0].name == "b.json"
    with pytest.raises(ArtifactError, match="on another machine"):
        run_files.find_baseline(tmp_path / "d.json", HERE)
    with pytest.raises(UsageError, match="has 4 of others or incomplete"):
        run_files.find_baseline(tmp_path, "third")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "edgedistill-benchmarks", "version": 1, "mad', "cut off"),
        ("[]", "is no run of the benchmarks"),
        ('{"kind": "edgedistill-benchmarks", "version": 9}', "version 9"),
        ('{"kind": "edgedistill-benchmarks", "version": 1}', "it lacks made"),
    ],
)
def test_a_baseline_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(ArtifactError, match=said):
        run_files.find_baseline(tmp_path / "a.json", HERE)


def test_damaged_figures(tmp_path: Path) -> None:
    file = run_of(tmp_path / "a.json")
    file.write_text(file.read_text("utf-8").replace('"groups": [', '"groups": [["x"],', 1), "utf-8")
    with pytest.raises(ArtifactError, match="damaged"):
        run_files.read_run(file)


def test_the_list_holds_every_script_and_only_known_inputs() -> None:
    own = {"run", "judging", "run_files", "hot_path_runs", "side_by_side"}
    listed = {script.name for script in side_by_side.SCRIPTS} | set(side_by_side.NO_MEASUREMENT)
    assert {file.stem for file in BENCHMARKS.glob("*.py")} - own == listed
    needed = {name for script in side_by_side.SCRIPTS for name in script.needs}
    assert needed == set(side_by_side.INPUTS)


def test_every_script_is_in_the_readme() -> None:
    text = (BENCHMARKS / "README.md").read_text("utf-8")
    assert [s.name for s in side_by_side.SCRIPTS if f"{s.name}.py" not in text] == []


def test_why_a_script_is_skipped() -> None:
    scripts = {script.name: script for script in side_by_side.SCRIPTS}
    assert "needs --input LLAMA_BENCH" in side_by_side.skipped(scripts["llama_bench"], {}, True)
    slow, inputs = scripts["methods_table"], {"RECIPE": ("r",)}
    assert "takes hours" in side_by_side.skipped(slow, inputs, False)
    assert side_by_side.skipped(slow, inputs, True) is None
    lacking = side_by_side.Script("x", modules=("no_such_module",))
    assert "needs the package no_such_module" in side_by_side.skipped(lacking, {}, True)


def test_a_script_gets_all_of_an_input_or_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files beside a peer's program are one command."""
    started: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        started.append(words[2:])
        return SimpleNamespace(returncode=0, stdout="{}")

    monkeypatch.setattr(side_by_side.subprocess, "run", run)
    inputs = side_by_side.read_inputs(["MODEL=a", "LLAMA_BENCH=program", "MODEL=b"])
    scripts = {script.name: script for script in side_by_side.SCRIPTS}
    for name in ("llama_bench", "decode_rate"):
        side_by_side.run_script(scripts[name], inputs)
    assert started == [["program", "a", "b"], ["a"]]


@pytest.mark.parametrize(("word", "said"), [("MODEL", "NAME=VALUE"), ("MODLE=x", "no input")])
def test_inputs_that_are_none(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        side_by_side.read_inputs([word])


def test_at_hand_is_the_newest_finished_stage(here: Path) -> None:
    for name in ("curate-1", "curate-2", "merge-torn"):
        (here / "w" / name).mkdir(parents=True)
    (here / "w" / "curate-1" / "manifest.json").touch()
    found = side_by_side.at_hand(here / "w")
    assert found["DATASET"][0].endswith("curate-1")
    assert "CHECKPOINT" not in found


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--baseline", "gone.json"], 1, "it cannot be read: No such file"),
        (["--baseline", "."], 2, "no complete run of this machine"),
        (["--input", "MODLE=x"], 2, "did you mean MODEL?"),
        (["--processes", "1"], 2, "of one process no noise is known"),
        (["--against", "x", "--baseline", "y"], 2, "not allowed with"),
        (["--against", "no-such-ref", "--out", "o"], 2, "no such commit, branch or tag"),
    ],
)
def test_bad_words(here: Path, words: list[str], code: int, said: str) -> None:
    done = bench(*words)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_hot_paths_run_and_are_kept(here: Path) -> None:
    words = ["--only", "sql_execution", "--processes", "2", "--seconds", "0.05", "--out", "o"]
    assert bench(*words).returncode == 0
    run = run_files.read_run(next((here / "o").glob("*.json")))
    assert list(run.benchmarks) == ["sql_execution"]
    assert len(run.benchmarks["sql_execution"].groups) == 2
    assert run.complete
    assert run.machine["fingerprint"] == HERE


def test_an_unknown_hot_path(here: Path) -> None:
    done = bench("--only", "trace_gots", "--out", "o")
    assert (done.returncode, "did you mean trace_gets?" in done.stderr) == (2, True), done.stderr


def test_a_failed_script_is_told(tmp_path: Path) -> None:
    found = side_by_side.run_script(
        side_by_side.Script("decode_rate", ("{MODEL}",)), {"MODEL": "x"}
    )
    assert "exit code" in found["failed"]
