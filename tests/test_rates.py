"""llama-bench's figures behind a context, and by number of threads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import Ran

from edgedistill.errors import RuntimeFailure, UsageError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.model_prompt import asked_model
from edgedistill.places import Here
from edgedistill.progress import Silent
from edgedistill.prompts import prompts_of
from edgedistill.rates import More, bench_step, require_depths
from edgedistill.result_file import read_result
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import Opened
from edgedistill.sitting import LACKING, Plan, sit, sit_in_turn
from edgedistill.student import TOKENIZER_GGUF

CONTEXT = 1024
REFUSED = "cannot make the context"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


def test_each_depth_and_number_of_threads_has_its_rates(model: Path) -> None:
    found: dict[str, list[float]] = {}
    for step in More(depths=(64, 512), threads=(1,)).steps(1):
        found |= bench_step(model, step, Here(), 2)
    names = [f"{test}{at}" for at in ("@d64", "@d512", "@t1") for test in ("pp512", "tg128")]
    assert list(found) == names
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found.values())


def test_a_depth_is_in_the_context(model: Path) -> None:
    """Where it was not, the tokens behind it would fit."""
    with LlamaCpp(model, threads=1, context_tokens=512) as loaded:
        assert loaded.bench(8, 4, 1, depth=504)["tg"][0] > 0
        with pytest.raises(RuntimeFailure, match="513 tokens do not fit into the context of 512"):
            loaded.bench(8, 4, 1, depth=505)


def test_depths_beyond_the_context(model: Path) -> None:
    require_depths(model, (0, CONTEXT - 512))
    said = f"--depths 513: with the 512 .* context of {CONTEXT} tokens\n  give at most 512"
    with pytest.raises(UsageError, match=said):
        require_depths(model, (16, 513))


def test_the_command(run: Callable[..., Ran], model: Path, tmp_path: Path) -> None:
    words = ["--depths", "0,256", "--threads", "1", "--repeats", "2"]
    done = run("bench", str(model), *words, "-o", str(tmp_path / "r.json"))
    assert done.code == 0, done.err
    kept = read_result(tmp_path / "r.json")
    assert list(kept.figures)[:4] == ["pp512", "tg128", "pp512@d256", "tg128@d256"]
    assert [len(group) for group in kept.figures["pp512@d256"].groups] == [3, 3]
    assert (kept.settings["threads"], kept.settings["thread_counts"]) == (1, [])
    assert "tg128@d256" in done.out


def test_several_numbers_of_threads_are_beside_the_sittings_own(model: Path) -> None:
    more = More(threads=(1,))
    made = sit(asked_model(model, None, None, None), Plan(1, 1, threads=1, more=more), Silent())
    assert list(made.figures)[:4] == ["pp512", "tg128", "pp512@t1", "tg128@t1"]


class Short(Here):
    """A machine whose memory has room for so many deep contexts, one behind the other."""

    def __init__(self, room: int) -> None:
        self.room, self.opened = room, list[int]()

    def open(self, model: Path, *, threads: int, context_tokens: int) -> Opened:
        self.opened.append(context_tokens)
        if context_tokens > 512:
            self.room -= 1
            if self.room < 0:
                raise RuntimeFailure(REFUSED)
        return super().open(model, threads=threads, context_tokens=context_tokens)


@pytest.fixture
def deep(tmp_path: Path) -> Plan:
    (tmp_path / "prompts.jsonl").write_text('{"id": "p0", "prompt": "the canoe"}\n', "utf-8")
    given, more = prompts_of(tmp_path / "prompts.jsonl", None), More(depths=(64,), threads=(1,))
    return Plan(processes=2, runs=1, turns=2, threads=1, more=more, prompts=given)


def test_a_context_without_room_is_refused_before_a_prompt_is_answered(
    model: Path, deep: Plan
) -> None:
    place = Short(0)
    with pytest.raises(RuntimeFailure, match=REFUSED):
        sit(asked_model(model, None, None, 8), deep, Silent(), place)
    assert place.opened == [64 + 512]


def test_a_context_that_is_refused_later_loses_no_answers(model: Path, deep: Plan) -> None:
    asked = asked_model(model, None, None, 8)
    one = sit(asked, deep, Silent(), Short(1))
    assert [len(one.figures[name].groups) for name in ("tg128@d64", "end_to_end_p50")] == [1, 2]
    lacking = LACKING.format("@d64", 2, 2, REFUSED)
    assert [note for note in one.notes if "were not measured" in note] == [lacking]
    for each in sit_in_turn([asked, asked], deep, Silent(), Short(0)):
        assert "tg128@d64" not in each.figures
        assert len(each.figures["tg128@t1"].groups) == 2
        assert len(each.figures["end_to_end_p50"].groups) == 2
        assert sum("were not measured" in note for note in each.notes) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threads", "0"], "0 is below 1"),
        (["--threads", "2,0"], "0 is below 1"),
        (["--threads", "two"], "no list of whole numbers"),
        (["--threads", "1,4096"], "--threads 4096: this process may use"),
        (["--threads", "4096"], "--threads 4096: this process may use"),
        (["--depths", "-1"], "-1 is below 0"),
        (["--depths", "1024"], "--depths 1024: with the 512 tokens"),
    ],
)
def test_bad_words(run: Callable[..., Ran], model: Path, words: list[str], said: str) -> None:
    done = run("bench", str(model), *words)
    assert (done.code, said in done.err) == (2, True), done.err


def test_depths_are_not_for_a_url(run: Callable[..., Ran]) -> None:
    done = run("bench", "http://127.0.0.1:9/v1", "--model", "m", "--depths", "16")
    assert (done.code, "--depths is for a file, and this is a URL" in done.err) == (2, True)
