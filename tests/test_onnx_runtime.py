from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import psutil
import pytest
import tiny

from edgedistill.errors import MissingTool, RuntimeFailure
from edgedistill.onnx_builder import build_onnx
from edgedistill.onnx_runtime import OnnxGenai
from edgedistill.runtimes import ONNX, open_runtime, size_of

PROMPT = "<|im_start|>user\nthe others in the canoe<|im_end|>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    student = tiny.tiny_student(folder / "student")
    build_onnx(student.folder, folder / "model", "int4-b32", context_tokens=512)
    return folder / "model"


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[OnnxGenai]:
    with OnnxGenai(model, threads=1, context_tokens=256) as loaded:
        yield loaded


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [child for child in found if "edgedistill.onnx_child" in child.cmdline()]


def test_facts(runtime: OnnxGenai) -> None:
    tokens = len(tiny.SPECIAL) + 256 + len(tiny.MERGES)
    assert runtime.facts["n_vocab"] == tokens
    assert runtime.facts["n_ctx"] == 256
    assert runtime.facts["eos"] == tiny.STOP
    assert runtime.facts["add_bos"] is False
    assert runtime.facts["lookup_parameters"] == 0  # its embedding is its head
    assert runtime.end_ids() == {tiny.STOP}
    assert runtime.metadata()["chat_template"] == tiny.TEMPLATE
    assert runtime.peak_memory_bytes() > 10e6


@pytest.mark.parametrize("text", [PROMPT, "näïve 中文 🙂", " \n\t x", "\t\r\t\tg  \t8S\n"])
def test_tokens_round_trip(runtime: OnnxGenai, text: str) -> None:
    assert runtime.detokenize(runtime.tokenize(text)) == text


def test_special_tokens_are_parsed_and_none_is_added(runtime: OnnxGenai) -> None:
    assert runtime.tokenize("<|im_end|>") == [tiny.STOP]
    assert runtime.tokenize("") == []
    assert runtime.detokenize([]) == ""


def test_the_chat_template_is_rendered(runtime: OnnxGenai) -> None:
    talk = [{"role": "user", "content": "{a} <b>\n"}]
    assert runtime.apply_chat_template(talk, True) == (
        "<|im_start|>user\n{a} <b>\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_is_the_argmax_of_the_logits(runtime: OnnxGenai, tmp_path: Path) -> None:
    asked = runtime.tokenize(PROMPT)
    made = runtime.generate(asked, 20, frozenset())
    assert (len(made.ids), made.stopped) == (20, False)
    likely = runtime.logits(asked + made.ids, len(asked), tmp_path / "l")
    found = np.fromfile(tmp_path / "l", np.float32).reshape(len(likely), -1)
    assert found.argmax(1).tolist() == likely == made.ids
    assert runtime.generate(asked, 20, frozenset()).ids == made.ids  # nothing stays in the cache


def test_greedy_is_what_an_app_gets(runtime: OnnxGenai, model: Path) -> None:
    """genai's own loop with the folder's own settings, as the bundle's README has it."""
    asked = runtime.tokenize(PROMPT)
    loaded = genai.Model(str(model))
    generator = genai.Generator(loaded, genai.GeneratorParams(loaded))
    generator.append_tokens(genai.Tokenizer(loaded).encode(PROMPT))
    made: list[int] = []
    while not generator.is_done() and len(made) < 20:
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    own = runtime.generate(asked, 20, frozenset({tiny.STOP}))
    assert own.ids == [token for token in made if token != tiny.STOP]


def test_generation_stops_before_the_stop_token(runtime: OnnxGenai) -> None:
    asked = runtime.tokenize(PROMPT)
    free = runtime.generate(asked, 20, frozenset()).ids
    made = runtime.generate(asked, 20, frozenset({free[4]}))
    assert made.ids == free[: free.index(free[4])]
    assert made.stopped
    assert 0 < made.time_to_first_token <= made.total_seconds


def test_logits_are_appended(runtime: OnnxGenai, tmp_path: Path) -> None:
    ids = runtime.tokenize(PROMPT)
    for _ in range(2):
        runtime.logits(ids, 4, tmp_path / "l")
    assert (tmp_path / "l").stat().st_size == 2 * (len(ids) - 4) * runtime.facts["n_vocab"] * 4


def test_bench_gives_a_rate_for_each_run(runtime: OnnxGenai) -> None:
    rates = runtime.bench(16, 4, 3)
    assert [len(rates["pp"]), len(rates["tg"])] == [3, 3]
    assert min(rates["pp"] + rates["tg"]) > 0


def test_a_bench_fits_into_the_context(model: Path) -> None:
    """Decoding feeds a token and makes so many; it does not end where the model would."""
    with OnnxGenai(model, threads=1, context_tokens=256) as own:
        assert len(own.bench(0, 255, 1)["tg"]) == 1
        assert len(own.bench(0, 55, 1, 200)["tg"]) == 1
        with pytest.raises(RuntimeFailure, match="257 tokens do not fit"):
            own.bench(0, 56, 1, 200)


def test_both_ways_of_decoding_give_the_same(runtime: OnnxGenai) -> None:
    """Tokens that are fed, and genai's own step, which is taken where its end is the caller's."""
    asked = runtime.tokenize(PROMPT)
    fed = runtime.generate(asked, 24, frozenset()).ids
    own = runtime.generate(asked, 24, frozenset({tiny.STOP})).ids
    assert own == fed[: len(own)]
    assert len(own) == 24 or fed[len(own)] == tiny.STOP


def test_a_folder_that_asks_for_other_sampling_is_asked_greedily(
    model: Path, runtime: OnnxGenai, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "genai_config.json").read_text("utf-8"))
    config["search"] |= {
        "repetition_penalty": 3.0, "min_length": 200, "num_beams": 2, "do_sample": True,
        "no_repeat_ngram_size": 1,
    }  # fmt: skip
    (other / "genai_config.json").write_text(json.dumps(config), "utf-8")
    asked, stop = runtime.tokenize(PROMPT), frozenset({tiny.STOP})
    with OnnxGenai(other, threads=1, context_tokens=256) as loaded:
        assert loaded.generate(asked, 24, stop).ids == runtime.generate(asked, 24, stop).ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no tokens"), ([10**6], "outside the vocabulary"), ([5] * 300, "do not fit")],
)
def test_what_cannot_be_done_is_said(model: Path, ids: list[int], message: str) -> None:
    with (
        OnnxGenai(model, threads=1, context_tokens=128) as own,
        pytest.raises(RuntimeFailure, match=message),
    ):
        own.generate(ids, 1, frozenset())


def spoilt(model: Path, to: Path, file: str, content: bytes) -> Path:
    shutil.copytree(model, to)
    (to / file).write_bytes(content)
    return to


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.onnx", b""),
        ("model.onnx", b"not a model" * 100),
        ("model.onnx.data", b"short"),
        ("genai_config.json", b"{"),
        ("genai_config.json", b"{}"),
        ("tokenizer.json", b"[]"),
    ],
)
def test_a_damaged_model_is_an_error(
    model: Path, tmp_path: Path, file: str, content: bytes
) -> None:
    folder, before = spoilt(model, tmp_path / "model", file, content), len(children())
    with pytest.raises(RuntimeFailure) as failure:
        OnnxGenai(folder, threads=1)
    assert failure.value.where == str(folder)
    assert len(children()) == before


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"there is no genai_config\.json"):
        OnnxGenai(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_child_that_dies_is_told_with_its_signal(model: Path) -> None:
    known = {child.pid for child in children()}
    with OnnxGenai(model, threads=1) as own:
        (child,) = (child for child in children() if child.pid not in known)
        child.send_signal(signal.SIGABRT)
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(RuntimeFailure, match=r"genai died .*asked to tokenize: .*SIGABRT"):
            own.tokenize("the")


def test_without_onnxruntime_genai(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise ModuleNotFoundError(\"No module named 'onnxruntime_genai'\")"
    (tmp_path / "onnxruntime_genai.py").write_text(code, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(MissingTool, match="onnxruntime-genai is not installed"):
        OnnxGenai(model)


def test_it_is_opened_by_name(model: Path) -> None:
    with open_runtime(ONNX, model, threads=1, context_tokens=64) as runtime:
        assert runtime.facts["n_ctx"] == 64
    assert size_of(model) == sum(file.stat().st_size for file in model.iterdir())


def test_answers_to_one_question_share_its_cache_and_stay_the_same(
    runtime: OnnxGenai, model: Path, tmp_path: Path
) -> None:
    question = runtime.tokenize(PROMPT)
    texts = ("the canoe", "others", "in the canoe")
    asked = [[*question, *runtime.tokenize(text)] for text in texts]
    for n, ids in enumerate(asked):
        runtime.logits(ids, len(question), tmp_path / f"shared{n}")
        with OnnxGenai(model, threads=1, context_tokens=256) as fresh:
            fresh.logits(ids, len(question), tmp_path / f"fresh{n}")
        assert (tmp_path / f"shared{n}").read_bytes() == (tmp_path / f"fresh{n}").read_bytes()


def test_an_answer_ends_where_a_stop_text_does(runtime: OnnxGenai) -> None:
    ids = runtime.tokenize(PROMPT)
    whole = runtime.generate(ids, 24, frozenset())
    stop = whole.text[5:8]
    made = runtime.generate(ids, 24, frozenset(), stop_texts=["not there", stop])
    assert len(made.ids) < len(whole.ids)
    assert stop in made.text
