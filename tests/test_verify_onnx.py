"""Broken ONNX exports, each built on purpose: the build must stop and say what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgedistill.artifacts import Checkpoint, Dataset, Exported, Student, load_finished
from edgedistill.errors import GateFailed
from edgedistill.export.onnx import export_onnx
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.verify.onnx import verify_onnx

SPEC = StudentSpec(weights="tiny", system="Answer with one query.")
BOUND = 1e-6


def made(folder: Path, architecture: str) -> tuple[Checkpoint, Exported]:
    student = tiny.tiny_student(folder / "student", architecture=architecture)
    checkpoint = Checkpoint(student.folder, "checkpoint")
    base = Student(student.folder, "s", "example/Tiny-2M-Instruct", "Apache-2.0", "")
    return checkpoint, export_onnx(checkpoint, base, "recipe", folder / "out", Silent())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Exported]:
    return made(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("dataset"))


def check(pair: tuple[Checkpoint, Exported], dataset: Dataset, out: Path) -> dict[str, Any]:
    verify_onnx(*pair, dataset, SPEC, BOUND, out, Silent())
    (folder,) = out.iterdir()
    done = load_finished(folder, reused=True)
    assert done is not None
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    return dict(done.facts)


def test_a_sound_export_passes(
    llama: tuple[Checkpoint, Exported], dataset: Dataset, tmp_path: Path
) -> None:
    facts = check(llama, dataset, tmp_path)
    assert facts["mean_kld"] < BOUND
    assert (facts["rows"], facts["texts_compared"]) == (4, 8 * 2 + 4)
    model = llama[1].model
    assert model.name == "Tiny-2M-Instruct-recipe-v1.0-fp32"
    assert {path.name for path in model.iterdir()} == {
        "model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_qwen2_passes(dataset: Dataset, tmp_path: Path) -> None:
    pair = made(tmp_path / "qwen2", "qwen2")
    assert check(pair, dataset, tmp_path / "checked")["mean_kld"] < BOUND


def in_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return changed


def swapped_tokens(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["H"], vocabulary["o"] = vocabulary["o"], vocabulary["H"]


def shifted(content: bytes) -> bytes:
    values = np.frombuffer(content, np.float32).copy()
    values[: len(values) // 8] *= 1.05
    return values.tobytes()


BREAKS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "eos": (
        "genai_config.json",
        in_json(lambda config: config["model"].update(eos_token_id=0)),
        r"stop with \[2\], but onnxruntime-genai's EOS is 0",
    ),
    "chat template": (
        "chat_template.jinja",
        lambda text: text.replace(b"assistant", b"model"),
        "the chat template is not the one training used",
    ),
    "token IDs": ("tokenizer.json", in_json(swapped_tokens), "token IDs of prompt .* differ"),
    "weights": ("model.onnx.data", shifted, "mean KLD of merged to exported is"),
    "vocabulary": (
        "genai_config.json",
        in_json(lambda config: config["model"].update(vocab_size=300)),
        "vocab_size of 300, but there are 272",
    ),
    "graph": ("model.onnx", lambda content: content[:-40], "cannot use the exported model"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_export_is_named(
    llama: tuple[Checkpoint, Exported], dataset: Dataset, tmp_path: Path, name: str
) -> None:
    file, change, message = BREAKS[name]
    broken = tmp_path / "broken"
    shutil.copytree(llama[1].model, broken)
    (broken / file).write_bytes(change((broken / file).read_bytes()))
    with pytest.raises(GateFailed, match=message) as failure:
        check((llama[0], Exported(tmp_path, "broken", broken)), dataset, tmp_path / "out")
    assert (failure.value.step, failure.value.where) == ("export", str(broken))
