from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny

from edgedistill.child import AMX_HINT, Child, crash_hint
from edgedistill.errors import ArtifactError, MissingTool, RuntimeFailure
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.runtime import CHILD, LLAMA_CPP, LlamaCpp, quantize_file
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.teacher.client import Call, TeacherClient
from edgedistill.teacher.local_server import serve

PROMPT = "<|im_start|>user\nthe others in the canoe<|im_end|>\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(model, threads=1, context_tokens=1024) as loaded:
        yield loaded


def children() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [child for child in found if "edgedistill.runtime_child" in child.cmdline()]


def test_facts(runtime: LlamaCpp) -> None:
    tokens = len(tiny.SPECIAL) + 256 + len(tiny.MERGES)
    assert runtime.facts["n_vocab"] == tokens
    assert runtime.facts["eos"] == tiny.STOP
    assert runtime.facts["add_bos"] is False
    assert tiny.STOP in runtime.end_ids()
    assert runtime.metadata()["tokenizer.chat_template"] == tiny.TEMPLATE
    assert runtime.peak_memory_bytes() > 10e6


def test_a_streamed_answer_counts_tokens_as_a_whole_one_does(model: Path) -> None:
    # Its tokens are mostly single bytes, and a streamed chunk is whole characters.
    asked = ({"role": "user", "content": "the others"},)
    call = Call("p", "m", asked, {"temperature": 0.0, "max_tokens": 24}, "v")
    with (
        serve(model, "m", threads=1, context_tokens=256, port=None, start_seconds=60) as server,
        TeacherClient(server.endpoint, 60, 1, 1) as client,
    ):
        whole, streamed = client.ask(call), client.stream(call)
    assert whole.completion_tokens > 1
    assert streamed.completion_tokens == whole.completion_tokens
    assert streamed.prompt_tokens == whole.prompt_tokens > 0


def test_a_server_that_dies_while_it_is_used(model: Path) -> None:
    call = Call("p", "m", ({"role": "user", "content": "the others"},), {"max_tokens": 4}, "v")
    died = r"(?s)model\.gguf.*died while it was asked"
    with pytest.raises(RuntimeFailure, match=died):
        ask_a_server_that_is_killed(model, call)


def ask_a_server_that_is_killed(model: Path, call: Call) -> None:
    with (
        serve(model, "m", threads=1, context_tokens=256, port=None, start_seconds=60) as server,
        TeacherClient(server.endpoint, 60, 1, 1) as client,
    ):
        process = psutil.Process(server.pid)
        process.kill()
        process.wait(20)  # so that the call finds nobody
        client.ask(call)


@pytest.mark.parametrize(
    ("code", "features", "hint"),
    [
        (-signal.SIGSEGV, ["avx2", "amx_int8"], AMX_HINT),
        (-signal.SIGSEGV, ["avx2"], None),
        (-signal.SIGABRT, ["amx_int8"], None),
        (1, ["amx_int8"], None),
    ],
)
def test_what_a_crash_tells(code: int, features: list[str], hint: str | None) -> None:
    assert crash_hint(code, features) == hint


@pytest.mark.parametrize("text", [PROMPT, "näïve 中文 🙂", " \n\t x"])
def test_tokens_round_trip(runtime: LlamaCpp, text: str) -> None:
    ids = runtime.tokenize(text)
    assert runtime.detokenize(ids) == text


def test_special_tokens_are_parsed_and_none_is_added(runtime: LlamaCpp) -> None:
    assert runtime.tokenize("<|im_end|>") == [tiny.STOP]
    assert runtime.tokenize("") == []
    assert runtime.detokenize([]) == ""


def test_greedy_is_the_argmax_of_the_logits(runtime: LlamaCpp, tmp_path: Path) -> None:
    asked = runtime.tokenize(PROMPT)
    made = runtime.generate(asked, 20, frozenset())
    assert len(made.ids) == 20
    assert not made.stopped
    likely = runtime.logits(asked + made.ids, len(asked), tmp_path / "l")
    found = np.fromfile(tmp_path / "l", np.float32).reshape(len(likely), -1)
    assert found.argmax(1).tolist() == likely == made.ids
    assert runtime.generate(asked, 20, frozenset()).ids == made.ids  # nothing stays in the cache


def test_generation_stops_before_the_stop_token(runtime: LlamaCpp) -> None:
    asked = runtime.tokenize(PROMPT)
    free = runtime.generate(asked, 20, frozenset()).ids
    made = runtime.generate(asked, 20, frozenset({free[4]}))
    assert made.ids == free[: free.index(free[4])]
    assert made.stopped
    assert 0 < made.time_to_first_token <= made.total_seconds


def test_logits_do_not_depend_on_how_a_text_is_cut(runtime: LlamaCpp, tmp_path: Path) -> None:
    """600 tokens need two batches, and more rows than one call may give."""
    ids = (runtime.tokenize(PROMPT) * 60)[:600]
    assert len(runtime.logits(ids, 1, tmp_path / "all")) == 599
    assert len(runtime.logits(ids, 590, tmp_path / "last")) == 10
    every = np.fromfile(tmp_path / "all", np.float32).reshape(599, -1)
    last = np.fromfile(tmp_path / "last", np.float32).reshape(10, -1)
    np.testing.assert_allclose(every[-10:], last, atol=0.02)


def test_logits_are_appended(runtime: LlamaCpp, tmp_path: Path) -> None:
    ids = runtime.tokenize(PROMPT)
    for _ in range(2):
        runtime.logits(ids, 4, tmp_path / "l")
    assert (tmp_path / "l").stat().st_size == 2 * (len(ids) - 4) * runtime.facts["n_vocab"] * 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error(model: Path) -> None:
    with (
        LlamaCpp(model, threads=1) as own,
        pytest.raises(OSError, match="No space left") as failure,
    ):
        own.logits([5] * 10, 2, Path("/dev/full"))
    assert failure.value.errno == errno.ENOSPC


def test_without_llama_cpp(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise ModuleNotFoundError(\"No module named 'llama_cpp'\")"
    (tmp_path / "llama_cpp.py").write_text(code, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(MissingTool, match="llama-cpp-python is not installed"):
        LlamaCpp(model)


def test_bench_gives_a_rate_for_each_run(runtime: LlamaCpp) -> None:
    rates = runtime.bench(16, 4, 3)
    assert [len(rates["pp"]), len(rates["tg"])] == [3, 3]
    assert min(rates["pp"] + rates["tg"]) > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no tokens"), ([10**6], "outside the vocabulary"), ([5] * 2000, "do not fit")],
)
def test_what_cannot_be_done_is_said(model: Path, ids: list[int], message: str) -> None:
    with LlamaCpp(model, threads=1) as own, pytest.raises(RuntimeFailure, match=message):
        own.generate(ids, 1, frozenset())


def test_no_child_is_left_behind(model: Path) -> None:
    before = len(children())
    with LlamaCpp(model, threads=1):
        assert len(children()) == before + 1
    assert len(children()) == before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    before = len(children())
    with pytest.raises(RuntimeFailure, match="cannot load this file") as failure:
        LlamaCpp(file)
    assert failure.value.where == str(file)
    assert len(children()) == before


def test_a_torn_file_is_told_with_the_last_lines(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(RuntimeFailure, match=r"its last lines:\n(.|\n)*not within the file bounds"):
        LlamaCpp(file)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_child_that_dies_is_told_with_its_signal(model: Path) -> None:
    known = {child.pid for child in children()}
    with LlamaCpp(model, threads=1) as own:
        (child,) = (child for child in children() if child.pid not in known)
        child.send_signal(signal.SIGABRT)
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(RuntimeFailure, match=r"asked to tokenize: .*SIGABRT"):
            own.tokenize("the")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("command", [CHILD, None, (*CHILD, "elsewhere")])
def test_this_processor_explains_the_crash_of_its_own_child_alone(
    command: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command is an emulator's guest, or runs on a device."""
    monkeypatch.setattr("edgedistill.machine.facts", lambda: {"cpu_features": ["amx_int8"]})
    known = {child.pid for child in children()}
    child = Child(LLAMA_CPP, Path("m.gguf"), command=command)
    (process,) = (one for one in children() if one.pid not in known)
    process.send_signal(signal.SIGSEGV)
    with pytest.raises(RuntimeFailure, match="signal SIGSEGV") as raised:
        child.ask("load")
    assert (raised.value.hint == AMX_HINT) is (command in (CHILD, None))


def test_silence_is_an_error(model: Path) -> None:
    own = LlamaCpp(model, threads=1, request_seconds=2)
    with pytest.raises(RuntimeFailure, match="no answer to 'bench' for 2 s"):
        own.bench(512, 512, 10_000)
    with pytest.raises(RuntimeFailure, match="after it was closed"):
        own.tokenize("the")


def test_ctrl_c_ends_the_child(model: Path) -> None:
    before = len(children())
    own = LlamaCpp(model, threads=1)
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        own.bench(512, 512, 10_000)
    assert len(children()) == before


def test_close_ends_a_child_that_is_busy(model: Path) -> None:
    own = LlamaCpp(model, threads=1)
    failed = threading.Event()

    def work() -> None:
        try:
            own.bench(512, 512, 10_000)
        except RuntimeFailure:
            failed.set()

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    own.close()
    thread.join(5)
    assert failed.is_set()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("format", ["Q4_0", "Q4_K_M", "Q8_0"])
def test_quantize_file(model: Path, tmp_path: Path, format: str) -> None:
    file = tmp_path / "q.gguf"
    quantize_file(model, file, format, threads=1)
    assert file.stat().st_size < model.stat().st_size
    with LlamaCpp(file, threads=1) as own:
        assert format.replace("_M", " - Medium") in own.facts["description"]
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


def test_quantize_failures_leave_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="no format Q9_9"):
        quantize_file(model, tmp_path / "q.gguf", "Q9_9")
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        quantize_file(tmp_path / "missing.gguf", tmp_path / "q.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_answers_to_one_question_share_its_cache_and_stay_the_same(
    runtime: LlamaCpp, model: Path, tmp_path: Path
) -> None:
    question = runtime.tokenize(PROMPT)
    texts = ("the canoe", "others", "in the canoe")
    asked = [[*question, *runtime.tokenize(text)] for text in texts]
    for n, ids in enumerate(asked):
        runtime.logits(ids, len(question), tmp_path / f"shared{n}")
        with LlamaCpp(model, threads=1, context_tokens=1024) as fresh:
            fresh.logits(ids, len(question), tmp_path / f"fresh{n}")
        assert (tmp_path / f"shared{n}").read_bytes() == (tmp_path / f"fresh{n}").read_bytes()
    runtime.generate(question, 3, frozenset())  # fills the cache with something else
    runtime.logits(asked[0], len(question), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "shared0").read_bytes()


def test_an_answer_ends_where_a_stop_text_does(runtime: LlamaCpp) -> None:
    ids = runtime.tokenize(PROMPT)
    whole = runtime.generate(ids, 24, frozenset())
    stop = whole.text[5:8]
    made = runtime.generate(ids, 24, frozenset(), stop_texts=["not there", stop])
    assert len(made.ids) < len(whole.ids)
    assert stop in made.text
    assert stop not in runtime.detokenize(made.ids[:-1])
