"""Damaged GGUF files: each ends in an error of ours or is taken, and nothing dies or hangs.

`python tests/test_damaged_files.py 200` prints the counts for so many files.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from edgedistill.errors import ArtifactError, EdgedistillError, RuntimeFailure, WeightsError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.gguf_header import read_header
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp, quantize_file
from edgedistill.student import TOKENIZER_GGUF, prepare_student

SECONDS = 60.0  # longest wait for an answer; a hang is longer than any load
KINDS = ("header", "keys", "tensors", "data", "cut")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("tiny"))


def small_model(folder: Path) -> Path:
    tiny.tiny_student(folder)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


def damaged(model: Path, number: int) -> bytes:
    """A copy with a few bytes changed in one part of the file, or with its end cut off."""
    chance, content = random.Random(number), bytearray(model.read_bytes())
    kind = KINDS[number % len(KINDS)]
    infos, start = content.index(b"token_embd.weight"), read_header(model).tensors[0].offset
    if kind == "cut":
        return bytes(
            content[: chance.choice([chance.randrange(start), chance.randrange(len(content))])]
        )
    first, last = {
        "header": (0, 24),
        "keys": (24, infos),
        "tensors": (infos, start),
        "data": (start, len(content)),
    }[kind]
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(first, last)
        content[at] = chance.choice([0, 255, content[at] ^ 1 << chance.randrange(8)])
    return bytes(content)


def load(file: Path) -> None:
    with LlamaCpp(file, threads=1, context_tokens=64, request_seconds=SECONDS) as runtime:
        runtime.generate(runtime.tokenize("the others"), 2, frozenset())


def quantize(file: Path) -> None:
    quantize_file(file, file.with_name("q.gguf"), "Q4_0", 1, request_seconds=SECONDS)


def study(file: Path) -> None:
    prepare_student(StudentSpec(weights=str(file)), file.parent / "stages", Silent())


def ending(work: Callable[[Path], None], file: Path) -> str:
    """How it ended: accepted, refused by our own reading, refused by llama.cpp, or its death.

    Any other error than ours is not caught: it is a fault.
    """
    try:
        work(file)
    except RuntimeFailure as error:
        if "gave no answer" in error.what:
            return "hung"
        return "died, told as an error" if " died while " in error.what else "refused by llama.cpp"
    except EdgedistillError:
        return "refused before llama.cpp"
    return "accepted"


@pytest.mark.parametrize("number", range(2 * len(KINDS)))
def test_a_damaged_file_is_an_error_or_taken(model: Path, tmp_path: Path, number: int) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(damaged(model, number))
    assert ending(load, file) != "hung"
    assert ending(quantize, file) != "hung"


@pytest.mark.parametrize("number", range(6 * len(KINDS)))
def test_a_damaged_student_is_an_error_or_taken(model: Path, tmp_path: Path, number: int) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(damaged(model, number))
    with contextlib.suppress(WeightsError):
        study(file)


@pytest.mark.parametrize("lost", ["merges", "tokens", "token_type"])
def test_a_student_without_a_key_says_so(model: Path, tmp_path: Path, lost: str) -> None:
    key = f"tokenizer.ggml.{lost}".encode()
    (tmp_path / "m.gguf").write_bytes(model.read_bytes().replace(key, key[:-1] + b"x"))
    with pytest.raises(WeightsError, match=f"m.gguf.*tokenizer.ggml.{lost}"):
        study(tmp_path / "m.gguf")


@pytest.mark.parametrize("number", range(400))
def test_reading_a_header_is_bounded(model: Path, tmp_path: Path, number: int) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(damaged(model, number))
    with contextlib.suppress(ArtifactError):  # any other error is a fault of the reader
        read_header(file)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        model, found = small_model(Path(name)), Counter[tuple[str, str, str]]()
        for number in range(count):
            file = model.with_name("damaged.gguf")
            file.write_bytes(damaged(model, number))
            for work in (load, quantize, study):
                found[work.__name__, KINDS[number % len(KINDS)], ending(work, file)] += 1
        for key, times in sorted(found.items()):
            print(*key, times, sep="\t")


if __name__ == "__main__":
    main(int(sys.argv[1]))
