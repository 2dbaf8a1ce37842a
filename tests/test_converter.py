"""The way through llama.cpp's converter: what it takes, what it says, and how it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
from gguf import GGUFReader
from tiny_families import family_student

from edgedistill.artifacts import Checkpoint, load_finished
from edgedistill.converter import PACKAGE, SCRIPT, VARIABLE, checkout, convert
from edgedistill.errors import ArtifactError, GateFailed, MissingTool, RuntimeFailure, UsageError
from edgedistill.export import export
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.verify import verify

NEEDS = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no llama.cpp")
SPEC = StudentSpec(weights="tiny")


def converter(folder: Path, script: str) -> Path:
    """A checkout whose script does what is given."""
    (folder / PACKAGE).mkdir(parents=True)
    (folder / PACKAGE / "__init__.py").write_text("def get_model_class(): pass\n", "utf-8")
    (folder / SCRIPT).write_text(script, "utf-8")
    return folder


@NEEDS
def test_an_architecture_that_is_not_ours(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "olmo2")
    checkpoint = Checkpoint(student.folder, "c")
    made = export(checkpoint, student, "sql", tmp_path / "out", Silent())
    done = load_finished(made.folder, reused=True)
    assert done is not None
    assert done.facts["path"].startswith("llama.cpp converter ")
    assert done.facts["architecture"] == "olmo2"
    fields = GGUFReader(made.model).fields
    assert fields["tokenizer.ggml.merges"].contents() == list(tiny.MERGES)
    assert [file.name for file in made.folder.glob("*.gguf")] == [made.model.name]
    dataset = tiny.tiny_dataset(tmp_path / "dataset")
    verify(checkpoint, made, dataset, SPEC, 1e-4, tmp_path / "v", Silent())
    (folder,) = (tmp_path / "v").iterdir()
    checked = load_finished(folder, reused=True)
    assert checked is not None
    assert 0 < checked.facts["tensors_equal"] <= checked.facts["tensors"]
    broken = tiny.rewrite_gguf(
        made.model, tmp_path / "b.gguf", tensors={"blk.0.attn_q_norm.weight": lambda v: v[::-1]}
    )
    odd = type(made)(tmp_path, "broken", broken)
    with pytest.raises(GateFailed, match="mean KLD"):
        verify(checkpoint, odd, dataset, SPEC, 1e-4, tmp_path / "v", Silent())


def test_our_own_way_is_said(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student")
    made = export(Checkpoint(student.folder, "c"), student, "sql", tmp_path / "out", Silent())
    done = load_finished(made.folder, reused=True)
    assert done is not None
    assert done.facts["path"] == "edgedistill"


@pytest.mark.skipif(VARIABLE in os.environ, reason="a converter is there")
def test_without_a_converter_the_families_are_named(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "olmo2")
    with pytest.raises(ArtifactError, match="only Llama and SmolLM2") as failure:
        export(Checkpoint(student.folder, "c"), student, "sql", tmp_path / "out", Silent())
    assert VARIABLE in str(failure.value.hint)


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("raise ValueError('this one is odd')", RuntimeFailure, "this one is odd"),
        ("import no_such_package", MissingTool, "no_such_package"),
        ("import time; time.sleep(600)", RuntimeFailure, "not done after 5 s"),
        ("pass", RuntimeFailure, "cannot convert"),  # it says nothing and writes nothing
    ],
)
def test_a_converter_that_fails(
    tmp_path: Path, script: str, error: type[Exception], said: str
) -> None:
    folder = converter(tmp_path / "llama.cpp", script)
    seconds = 5.0 if "sleep" in script else 120.0
    with pytest.raises(error, match=said):
        convert(folder, tmp_path, tmp_path / "out.gguf", "F16", seconds)


def test_a_folder_without_a_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=SCRIPT):
        checkout()
    converter(tmp_path / "llama.cpp", "pass")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "llama.cpp"))
    assert checkout() == tmp_path / "llama.cpp"
    monkeypatch.delenv(VARIABLE)
    assert checkout() is None
