"""Several model files measured process by process in turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import tiny
from conftest import Ran

from edgedistill.cli import cli
from edgedistill.cli_bench import _files_of
from edgedistill.differences import difference
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.model_prompt import asked_model
from edgedistill.places import Here
from edgedistill.progress import Silent
from edgedistill.prompts import prompts_of
from edgedistill.rates import bench_together
from edgedistill.result_file import read_result
from edgedistill.runtimes import Opened, Runtime
from edgedistill.sitting import TURNS, Plan, sit_in_turn
from edgedistill.student import TOKENIZER_GGUF


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model under three names."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder, says="Sure")
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "a.gguf", made_from, Silent())
    return [
        folder / "a.gguf",
        *(shutil.copy(folder / "a.gguf", folder / f"{n}.gguf") for n in "bc"),
    ]


class Noting(Here):
    """Here, which notes what is opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        self.opened.append(model.stem)
        return super().open(model, threads=threads, context_tokens=context_tokens)


def test_who_goes_first_alternates(models: list[Path]) -> None:
    place, asked = Noting(), [asked_model(each, None, None, None) for each in models]
    found = sit_in_turn(asked, Plan(processes=2, turns=3, threads=1), Silent(), place)
    assert "".join(place.opened) == "abccbaabc" + "abccba"  # the turns, then the processes
    assert [each.model["name"] for each in found] == ["a", "b", "c"]
    assert len({each.sitting for each in found}) == 1
    assert found[0].sitting is not None
    for each in found:
        shapes = {name: [len(group) for group in f.groups] for name, f in each.figures.items()}
        assert shapes["tg128"] == shapes["pp512"] == [2, 2, 2]
        assert (shapes["load"], shapes["peak_memory"]) == ([1, 1], [1, 1, 1])
        assert each.settings["turns"] == 3
    first, *others = (each.roofline for each in found)
    assert all(each and first and each["bandwidth_gb_s"] == first["bandwidth_gb_s"]
               for each in others)  # fmt: skip


def test_runs_of_one_test_are_next_to_each_other() -> None:
    asked = []

    class Timed:
        def __init__(self, name: str) -> None:
            self.name = name

        def bench(self, pp: int, tg: int, runs: int) -> dict[str, list[float]]:
            asked.append(f"{self.name}{pp or tg}")
            return {"pp": [1.0] * runs * bool(pp), "tg": [2.0] * runs * bool(tg)}

    models = cast("list[Runtime]", [Timed("a"), Timed("b")])
    assert bench_together(models, 2) == [{"pp512": [1.0, 1.0], "tg128": [2.0, 2.0]}] * 2
    assert asked == ["a512", "b512", "a128", "b128"]


def test_prompts_are_answered_by_all_and_timed_by_process(
    models: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"id": "a", "prompt": "the others"}\n{"id": "b", "prompt": "in a canoe"}\n'
    )
    plan = Plan(processes=2, turns=3, threads=1, prompts=prompts_of(tmp_path / "p.jsonl", None))
    place, asked = Noting(), [asked_model(each, None, None, 8) for each in models[:2]]
    one, two = sit_in_turn(asked, plan, Silent(), place)
    assert "".join(place.opened) == "abbaab" + "abba"
    for each in (one, two):
        assert [len(group) for group in each.figures["end_to_end_p50"].groups] == [2, 2]
        assert len(each.figures["tg128"].groups) == 3
        assert len(each.figures["peak_memory"].groups) == 2
    assert one.likeness is not None
    assert two.likeness is not None
    assert one.likeness["rows"] == two.likeness["rows"]


def test_the_command_keeps_a_file_for_each(
    run: Callable[..., Ran], models: list[Path], here: Path
) -> None:
    same = here / "a.gguf"
    shutil.copy(models[0], same)
    words = ["bench", *map(str, models[:2]), str(same), "--repeats", "2", "--threads", "1"]
    words += ["--turns", "10"]
    done = run(*words, "--out", "r")
    assert done.code == 0, done.err
    kept = [here / "r" / f"{name}.json" for name in ("a", "b", "a-2")]
    results = [read_result(file) for file in kept]
    assert len({each.sitting for each in results}) == 1
    assert [done.err.count(f"kept: {Path('r') / file.name}\n") for file in kept] == [1, 1, 1]
    assert done.out.count("pp512  ") == 3
    calm = [replace(each, load={**each.load, "busy": False}) for each in results]
    for figure, by_turn in (("tg128", True), ("pp512", True), ("load", False)):
        found = difference(figure, calm[1], calm[0])
        assert found is not None
        assert found.in_turn == by_turn  # which the files tell
    assert run("compare", "r", "--baseline", "r/a.json").code == 0
    again = run(*words, "--out", "r")
    assert again.code == 0, again.err
    assert len({read_result(file).sitting for file in kept} | {results[0].sitting}) == 2
    told = run("--json", *words).json
    assert [each["model"]["name"] for each in told] == ["a", "b", "a"]
    alone = run("--json", "bench", str(models[0]), "--repeats", "2", "--threads", "1").json
    assert (alone["model"]["name"], alone["sitting"]) == ("a", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://127.0.0.1:9/v1", "--model", "m"], "a server is measured alone"),
        (["--device", "emulated://phone", "--prompts", "p.jsonl"], "on this machine alone"),
        (["--device", "ssh://nowhere"], "on this machine alone"),
        (["--out", "r.json"], "several MODELs give a folder of files, not one r.json"),
        (["--turns", "3"], "3 is not in the range 10<=x<=1000"),
        (["--out", "taken"], "taken is a file, and several MODELs give a folder"),
        (["--out", "no/r"], "there is no folder no"),
    ],
)
def test_what_takes_no_turns(
    run: Callable[..., Ran], models: list[Path], here: Path, words: list[str], said: str
) -> None:
    (here / "taken").write_text("")
    done = run("bench", *map(str, models[:2]), *words)
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_sitting_that_gives_nothing_leaves_folders_as_they_were(
    run: Callable[..., Ran], models: list[Path], here: Path
) -> None:
    (here / "ours").mkdir()
    for out in ("ours", "made"):
        assert run("bench", str(models[0]), "nowhere.gguf", "--out", out).code == 1
    assert [(here / out).is_dir() for out in ("ours", "made")] == [True, False]


def test_the_command_takes_as_many_turns_as_a_plan() -> None:
    (option,) = [each for each in cli.commands["bench"].params if each.name == "turns"]
    assert option.default == Plan().turns == TURNS


def test_one_model_takes_no_turns(run: Callable[..., Ran], models: list[Path], here: Path) -> None:
    done = run("bench", str(models[0]), "--turns", "13")
    assert (done.code, "--turns is for several files" in done.err) == (2, True)
    (here / "r").mkdir()
    done = run("bench", str(models[0]), "--out", "r")
    assert (done.code, "r is a folder, and one MODEL gives one file" in done.err) == (2, True)


def test_names_that_are_taken() -> None:
    files = ["v1/model.gguf", "v2/model.gguf", "v3/Model.gguf", "model-2.gguf"]
    found = [file.name for file in _files_of(files, Path("r")) or ()]
    assert found == ["model.json", "model-2.json", "Model-3.json", "model-2-2.json"]
