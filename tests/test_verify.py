"""Broken exports, each built on purpose: the build must stop and say what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgedistill.artifacts import Checkpoint, Dataset, Exported, Student, load_finished
from edgedistill.errors import GateFailed
from edgedistill.export import export
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.verify import verify

SPEC = StudentSpec(weights="tiny", system="Answer with one query.")
BOUND = 1e-4
EOS = "tokenizer.ggml.eos_token_id"
TEMPLATE = "tokenizer.chat_template"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_student(folder)
    return Checkpoint(folder, "checkpoint")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    student = Student(checkpoint.folder, "s", "example/Tiny-2M-Instruct", "Apache-2.0", "")
    return export(checkpoint, student, "recipe", tmp_path_factory.mktemp("out"), Silent())


@pytest.fixture
def broken_by(
    checkpoint: Checkpoint, exported: Exported, dataset: Dataset, tmp_path: Path
) -> Callable[..., str]:
    """Verify the export after some keys or tensors of the file, and some keys of what the student
    claims to be, were changed; returns what the build says."""

    def broken(
        keys: dict[str, Any] | None = None,
        tensors: dict[str, Callable[[Any], Any]] | None = None,
        claimed: dict[str, Any] | None = None,
        bound: float = BOUND,
    ) -> str:
        file = tiny.rewrite_gguf(exported.model, tmp_path / "broken.gguf", keys, tensors)
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint.folder, folder)
        entries = json.loads((folder / TOKENIZER_GGUF).read_text("utf-8"))
        for entry in entries:
            entry["value"] = (claimed or {}).get(entry["key"], entry["value"])
        (folder / TOKENIZER_GGUF).write_text(json.dumps(entries), "utf-8")
        made = Exported(tmp_path, "broken", file)
        with pytest.raises(GateFailed) as failure:
            verify(Checkpoint(folder, "c"), made, dataset, SPEC, bound, tmp_path / "out", Silent())
        assert (failure.value.step, failure.value.exit_code) == ("export", 3)
        assert failure.value.where == str(file)
        (torn,) = (tmp_path / "out").iterdir()
        assert load_finished(torn, reused=True) is None
        return failure.value.what

    return broken


def test_a_sound_export_passes(
    checkpoint: Checkpoint, exported: Exported, dataset: Dataset, tmp_path: Path
) -> None:
    verify(checkpoint, exported, dataset, SPEC, BOUND, tmp_path, Silent())
    (folder,) = tmp_path.iterdir()
    done = load_finished(folder, reused=True)
    assert done is not None
    assert 0 <= done.facts["mean_kld"] < BOUND
    assert done.facts["rows"] == 4
    assert done.facts["texts_compared"] == 8 * 2 + 4
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_a_rewritten_file_is_still_sound(
    checkpoint: Checkpoint, exported: Exported, dataset: Dataset, tmp_path: Path
) -> None:
    """So that what the other tests find broken is what they broke."""
    file = tiny.rewrite_gguf(exported.model, tmp_path / "same.gguf")
    made = Exported(tmp_path, "same", file)
    verify(checkpoint, made, dataset, SPEC, BOUND, tmp_path / "out", Silent())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({EOS: 0}, f"{EOS} differs in the exported file: 0 instead of 2"),
        (
            {TEMPLATE: tiny.TEMPLATE.replace("assistant", "model")},
            f"{TEMPLATE} differs in the exported file: at position",
        ),
        ({TEMPLATE: None}, f"{TEMPLATE} differs in the exported file: None instead of"),
        (
            {"tokenizer.ggml.model": "llama"},
            "tokenizer.ggml.model differs in the exported file: 'llama' instead of 'gpt2'",
        ),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre differs"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token differs"),
        (
            {"tokenizer.ggml.merges": list(reversed(tiny.MERGES))},
            "tokenizer.ggml.merges differs in the exported file: at position 0 of",
        ),
    ],
)
def test_a_changed_key_is_named(
    broken_by: Callable[..., str], keys: dict[str, Any], expected: str
) -> None:
    assert expected in broken_by(keys)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"tokenizer.ggml.pre": "qwen2"}, "token IDs of prompt validation-0 differ: at position"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0},
            "token IDs of prompt validation-0 differ: at position 0 of",
        ),
        (
            {"tokenizer.ggml.merges": list(reversed(tiny.MERGES))},
            "token IDs of answer validation-1 differ: at position 1 of 12: ",
        ),
        ({EOS: 0}, "training taught the student to stop with [2]"),
        ({TEMPLATE: "{{ messages }}"}, "the chat template is not the one training used"),
        ({"tokenizer.ggml.model": "llama"}, "llama.cpp cannot use the exported file"),
    ],
)
def test_a_student_that_claims_the_wrong_tokenizer(
    broken_by: Callable[..., str], changed: dict[str, Any], expected: str
) -> None:
    """File and student agree with each other, but not with what training used."""
    assert expected in broken_by(changed, claimed=changed)


def test_permuted_rows_are_found_by_kld_and_named(broken_by: Callable[..., str]) -> None:
    name = "blk.1.attn_k.weight"
    said = broken_by(tensors={name: lambda values: values[::-1]})
    assert "mean KLD of merged to exported is" in said
    assert f"above the bound of {BOUND:g}" in said
    assert f"not the checkpoint's values: {name} (off by 1" in said


def test_two_swapped_rows_that_no_prompt_uses(broken_by: Callable[..., str]) -> None:
    """KLD on real prompts alone would not see it."""

    def swap(values: Any) -> Any:
        values[[-1, 0]] = values[[0, -1]]
        return values

    said = broken_by(tensors={"token_embd.weight": swap}, bound=1e9)
    assert "these tensors do not hold the checkpoint's values: token_embd.weight" in said


def test_wrong_hyperparameters_are_found_by_kld(broken_by: Callable[..., str]) -> None:
    said = broken_by({"llama.rope.freq_base": 100.0})
    assert "mean KLD" in said
    assert "look at the hyperparameters" in said


def test_embedding_with_other_rows_than_tokens(broken_by: Callable[..., str]) -> None:
    said = broken_by(tensors={"token_embd.weight": lambda values: values[:-1]})
    assert "tokens, but there are 271 rows in token_embd.weight" in said


def test_a_file_that_is_no_gguf(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(GateFailed, match="not a readable GGUF file"):
        verify(checkpoint, Exported(tmp_path, "x", file), dataset, SPEC, BOUND, tmp_path, Silent())
