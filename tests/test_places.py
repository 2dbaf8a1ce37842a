"""This machine as a place, and an ONNX model folder measured at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from conftest import Ran

from edgedistill.ceilings import Ceilings
from edgedistill.conditions import Conditions
from edgedistill.errors import ArtifactError, DeviceError
from edgedistill.load_watch import Load
from edgedistill.model_prompt import asked_model, context_limit, model_facts
from edgedistill.onnx_builder import build_onnx
from edgedistill.places import Here, kernels_of, kind_of, last_told
from edgedistill.progress import Silent
from edgedistill.prompts import prompts_of
from edgedistill.result_file import Result, read_result
from edgedistill.runtimes import ONNX, size_of
from edgedistill.sitting import Plan, sit

SAYS = "Sure"
CONTEXT = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    student = tiny.tiny_student(folder / "student", says=SAYS)
    config = json.loads((student.folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = CONTEXT
    (student.folder / "config.json").write_text(json.dumps(config), "utf-8")
    build_onnx(student.folder, folder / "tiny-int4", "int4-b32", context_tokens=512)
    return folder / "tiny-int4"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"id": f"p{i}", "prompt": f"the canoe {i}", "reference": SAYS} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return tmp_path / "prompts.jsonl"


class Metered(Here):
    """Here, with an energy counter that gains 3 J a reading."""

    def __init__(self) -> None:
        self._joules: Iterator[int] = iter(range(0, 1000, 3))

    def conditions(self) -> Conditions:
        return Conditions(None, None, None, None, None, float(next(self._joules)))


class Heard:
    """A watch that has heard so much, and whose device is gone when it is stopped."""

    def __init__(self, before: float) -> None:
        self.before: float | None = before

    def stop(self) -> Load:
        raise DeviceError("counting other work: lost")


class GoneAtLast(Here):
    """A device that tells its conditions only so many times, and no ceilings."""

    def __init__(self, times: int = 0) -> None:
        self.times = times

    def conditions(self) -> Conditions:
        self.times -= 1
        if self.times < 0:
            raise DeviceError("asking how it is: lost")
        return Conditions("mains", None, None, None, None, None)

    def ceilings(self, threads: int) -> Ceilings | None:
        raise DeviceError("lost while the runner was asked to measure")


class Counted(Heard):
    def stop(self) -> Load:
        return Load(self.before, 0.01)


@pytest.mark.parametrize(("before", "load"), [(0.3, Load(0.3, None)), (0.0, Load(None, None))])
def test_a_device_that_is_gone_at_last_tells_nothing_more(before: float, load: Load) -> None:
    last = last_told(GoneAtLast(), Heard(before), 1, Silent())
    assert (last.load, last.conditions, last.ceilings) == (load, None, None)
    (note,) = last.notes
    assert note.startswith("the device was gone when all was measured")
    assert note.endswith("known: counting other work: lost")


def test_what_a_device_told_before_it_was_gone_is_kept() -> None:
    last = last_told(GoneAtLast(), Counted(0.0), 1, Silent())
    assert (last.load.during, last.conditions) == (0.01, None)
    last = last_told(GoneAtLast(1), Counted(0.0), 1, Silent())
    assert last.conditions is not None
    assert last.notes == [
        "the device's ceilings are not known: lost while the runner was asked to measure"
    ]


def test_kernels_are_those_that_llama_cpp_says_it_has() -> None:
    said = "CPU : SSE3 = 1 | AVX2 = 0 | SVE_CNT = 16 | AMX_INT8 = 1 | REPACK = 1 | "
    assert kernels_of({"kernels": said}) == {"kernels": "SSE3 AMX_INT8 REPACK"}
    assert kernels_of({}) == {}


def measured(model: Path, prompts: Path) -> Result:
    asked = asked_model(model, None, None, 8)
    given = prompts_of(prompts, None)
    return sit(asked, Plan(processes=2, runs=2, threads=1, prompts=given), Silent(), Metered())


def test_an_onnx_model_is_measured_as_a_gguf_file_is(model: Path, prompts: Path) -> None:
    result = measured(model, prompts)
    assert {"pp512", "tg128", "cold_start", "inter_token_p95"} <= result.figures.keys()
    assert result.model["name"] == "tiny-int4"
    assert result.model["bytes"] == size_of(model)
    assert result.device["runtime"]["name"] == ONNX == kind_of(model)
    assert result.device["runtime"]["onnxruntime-genai"]
    assert result.likeness is not None
    assert {row["answer"] for row in result.likeness["rows"]} == {SAYS}


def test_energy_is_by_answer(model: Path, prompts: Path) -> None:
    """3 J while a process gives 4 answers, its first prompt's twice."""
    assert measured(model, prompts).figures["energy_per_answer"].value == 0.75


def test_its_digest_is_of_all_its_files(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    found = {model_facts(asked_model(each, None, None, None))["sha256"] for each in (model, other)}
    assert len(found) == 2


def test_special_tokens_as_hugging_face_writes_them(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    file = other / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    config["eos_token"] = {"content": config["eos_token"], "lstrip": False}
    del config["chat_template"]  # it lies in a file beside
    file.write_text(json.dumps(config), "utf-8")
    asked = asked_model(other, None, None, None).prompt().prompt_ids("the canoe")
    assert asked == asked_model(model, None, None, None).prompt().prompt_ids("the canoe")


def test_one_without_its_tokenizer(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"its tokenizer cannot be read.*\n.*belong into"):
        asked_model(other, None, None, None).prompt()


def test_the_context_it_was_made_for(model: Path, tmp_path: Path) -> None:
    assert context_limit(model) == CONTEXT
    (tmp_path / "genai_config.json").write_text("{", "utf-8")
    with pytest.raises(ArtifactError, match=r"genai_config\.json cannot be read"):
        context_limit(tmp_path)


def test_the_command(run: Callable[..., Ran], model: Path, here: Path) -> None:
    words = ["--threads", "1", "--repeats", "2", "--depths", "0,64", "-o", "r.json"]
    done = run("bench", str(model), *words)
    assert done.code == 0, done.err
    assert "pp512@d64" in done.out
    assert read_result(here / "r.json").figures["tg128@d64"].value > 0
