"""aarch64 under emulation: only the pinned sources, only a whole child, and a child that answers as
this machine's own. What needs the real kernels is skipped where they were not compiled before
(`edgedistill build --target phone` compiles them)."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgedistill import emulator
from edgedistill.artifacts import digest_of_file
from edgedistill.errors import MissingTool, RuntimeFailure, WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.fidelity import kl_divergence
from edgedistill.progress import Silent
from edgedistill.runner.building import compiled, runner_of
from edgedistill.runtime import CHILD, LlamaCpp, quantize_file
from edgedistill.student import TOKENIZER_GGUF

BUILD = emulator.PROCESSORS["phone"].build
PROMPT = "<|im_start|>user\nthe others in the canoe, näïve 🙂<|im_end|>\n"


@dataclass
class Index:
    """A package index with one source archive: a CMake project that stops with a message."""

    asked: int = 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked += 1
        archive = folder / "sources.tar.gz"
        with tarfile.open(archive, "w:gz") as members:
            for name in ("CMakeLists.txt", "src/a.cpp", "models/large.gguf"):
                data = b'message(FATAL_ERROR "these are not the sources")'
                member = tarfile.TarInfo(f"package-1.0/vendor/llama.cpp/{name}")
                member.size, member.mtime = len(data), 0
                members.addfile(member, io.BytesIO(data))
        return archive


def test_other_sources_than_the_pinned_ones_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="must have sha256 0000"):
        compiled(tmp_path, "1.0", "0000", BUILD, Silent(), Index())
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


@pytest.mark.skipif(emulator.emulator_problem() is not None, reason="no cross compiler")
def test_what_does_not_compile_is_told_with_its_last_lines(tmp_path: Path) -> None:
    index = Index()
    pinned = digest_of_file(index("package==1.0", tmp_path))
    kept = tmp_path / "kept"
    for _ in range(2):  # the unpacked sources are kept
        with pytest.raises(RuntimeFailure, match="these are not the sources"):
            compiled(kept, "1.0", pinned, BUILD, Silent(), index)
        # As if edgedistill had been elsewhere: CMake refuses such a build folder.
        settings = (kept / "build-aarch64" / "CMakeCache.txt").read_text("utf-8")
        assert str(kept / "own") in settings
        there = settings.replace(str(kept / "own"), str(tmp_path / "elsewhere"))
        (kept / "build-aarch64" / "CMakeCache.txt").write_text(there, "utf-8")
    assert index.asked == 2
    unpacked = {path.name for path in (tmp_path / "kept" / "source").rglob("*") if path.is_file()}
    assert unpacked == {"CMakeLists.txt", "a.cpp"}


def test_a_whole_child_is_used_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    child, index = runner_of(tmp_path, BUILD), Index()
    child.write_bytes(b"a program")
    (tmp_path / f"{child.name}.sha256").write_text(digest_of_file(child), "ascii")
    assert compiled(tmp_path, "1.0", "0000", BUILD, Silent(), index) == child
    assert index.asked == 0
    child.write_bytes(b"a progrem")
    with pytest.raises(WeightsError):
        compiled(tmp_path, "1.0", "0000", BUILD, Silent(), index)


def test_no_processor_for_a_laptop(tmp_path: Path) -> None:
    assert emulator.identity("laptop") is None
    with pytest.raises(MissingTool):
        emulator.prepare_aarch64("laptop", Silent(), tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="QEMU's user-mode emulation needs Linux")
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = emulator.emulator_problem() or ""
    assert "qemu-aarch64, aarch64-linux-gnu-g++, cmake, make not found (Debian" in problem


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "f16.gguf", made_from, Silent())
    quantize_file(folder / "f16.gguf", folder / "model.gguf", "Q4_0", threads=1)
    return folder / "model.gguf"


@pytest.fixture(scope="module", params=sorted(emulator.PROCESSORS))
def child(request: pytest.FixtureRequest) -> emulator.Emulator:
    found = emulator.cached(request.param)
    if found is None:
        pytest.skip(emulator.emulator_problem() or f"not compiled yet for '{request.param}'")
    return found


@pytest.fixture(scope="module")
def pair(model: Path, child: emulator.Emulator) -> Iterator[tuple[LlamaCpp, LlamaCpp]]:
    """The same file on this machine's kernels and on emulated ones."""
    with (
        LlamaCpp(model, threads=1) as here,
        LlamaCpp(model, threads=1, command=child.command) as there,
    ):
        yield here, there


@pytest.mark.timeout(1200)  # emulated, so slow
def test_the_emulated_child_answers_every_request(
    pair: tuple[LlamaCpp, LlamaCpp], tmp_path: Path
) -> None:
    here, there = pair
    assert set(here.facts) - set(there.facts) == {"load_seconds"}
    assert there.facts["n_vocab"] == here.facts["n_vocab"]
    assert "DOTPROD = 1" in there.facts["kernels"]
    assert "CPU_REPACK" in there.facts["buffers"]
    assert there.metadata() == here.metadata()
    assert there.end_ids() == here.end_ids()
    ids = here.tokenize(PROMPT)
    assert there.tokenize(PROMPT) == ids
    assert there.detokenize(ids) == here.detokenize(ids) == PROMPT
    long = (ids * 40)[:600]
    for runs, name in ((here, "here"), (there, "there")):
        runs.logits(long, 520, tmp_path / name)  # two batches before, two blocks of rows
    a, b = (np.fromfile(tmp_path / n, np.float32) for n in ("here", "there"))
    size = here.facts["n_vocab"]
    kld = kl_divergence(a.reshape(-1, size), b.reshape(-1, size))
    assert len(kld) == 80
    assert 0 < kld.mean() < 1e-3  # other kernels, the same model
    made = there.generate(ids, 8, frozenset())
    likely = there.logits(ids + made.ids, len(ids), tmp_path / "made")
    assert likely == made.ids
    assert made.text == here.detokenize(made.ids)
    stopped = there.generate(ids, 8, frozenset({made.ids[3]}))
    assert (stopped.stopped, stopped.ids) == (True, made.ids[: made.ids.index(made.ids[3])])


@pytest.mark.parametrize("ids", [[], [10**6], [5] * 2000])
def test_the_emulated_child_refuses_what_the_other_refuses(
    model: Path, child: emulator.Emulator, ids: list[int]
) -> None:
    told = []
    for command in (CHILD, child.command):
        with (
            LlamaCpp(model, threads=1, command=command) as own,
            pytest.raises(RuntimeFailure) as failure,
        ):
            own.generate(ids, 1, frozenset())
        told.append(str(failure.value).split(";")[0])
    assert told[0] == told[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error(pair: tuple[LlamaCpp, LlamaCpp]) -> None:
    with pytest.raises(OSError, match="No space left"):
        pair[1].logits([5] * 10, 2, Path("/dev/full"))


def test_a_file_that_is_no_model(child: emulator.Emulator, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(RuntimeFailure, match="cannot load this file"):
        LlamaCpp(file, command=child.command)
