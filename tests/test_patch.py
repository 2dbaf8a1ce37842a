from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgedistill.artifacts import Checkpoint, digest_of_file
from edgedistill.errors import ArtifactError
from edgedistill.export import export
from edgedistill.patch import apply_patch, segments, write_patch
from edgedistill.progress import Silent
from edgedistill.runtime import quantize_file


def model(folder: Path, seed: int = 0, name: str = "x", format: str = "Q4_0") -> Path:
    student = tiny.tiny_student(folder / f"student-{seed}-{name}", seed)
    made = export(Checkpoint(student.folder, f"c{seed}"), student, name, folder, Silent()).model
    quantize_file(made, folder / f"{seed}-{name}-{format}.gguf", format, 1)
    return folder / f"{seed}-{name}-{format}.gguf"


@pytest.mark.parametrize(
    ("seed", "name", "format"),
    [(1, "x", "Q4_0"), (0, "x", "Q4_0"), (1, "a-longer-name", "Q4_0"), (0, "x", "Q5_K_M")],
)
def test_old_and_patch_give_the_new_file(tmp_path: Path, seed: int, name: str, format: str) -> None:
    old, new = model(tmp_path / "old"), model(tmp_path / "new", seed, name, format)
    parts, patch = segments(old, new), io.BytesIO()
    written = write_patch(old, new, parts, patch)
    assert written == len(patch.getvalue())
    patch.seek(0)
    made = apply_patch(old, parts, patch, tmp_path / "made")
    assert made == digest_of_file(new) == digest_of_file(tmp_path / "made")


def test_what_is_the_same_costs_next_to_nothing(tmp_path: Path) -> None:
    old = model(tmp_path / "old", format="F16")
    new = tiny.rewrite_gguf(old, tmp_path / "new.gguf", {"general.name": "another, longer name"})
    written = write_patch(old, new, segments(old, new), io.BytesIO())
    assert written < 0.01 * old.stat().st_size


def test_files_of_one_layout_are_one_segment(tmp_path: Path) -> None:
    old, new = model(tmp_path / "old"), model(tmp_path / "new", 1)
    assert segments(old, new) == [(new.stat().st_size, 0)]


@pytest.mark.parametrize("damage", ["torn", "altered", "empty", "old too short"])
def test_damage_is_an_error_or_another_digest(tmp_path: Path, damage: str) -> None:
    old, new = model(tmp_path / "old"), model(tmp_path / "new", 1)
    parts, patch = segments(old, new), io.BytesIO()
    write_patch(old, new, parts, patch)
    data = bytearray(patch.getvalue())
    if damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "altered":
        data[np.random.default_rng(0).integers(100, len(data) - 100)] ^= 4
    elif damage == "empty":
        data = bytearray()
    else:
        old.write_bytes(old.read_bytes()[:-400])
    with pytest.raises(ArtifactError, match="the update is damaged"):
        apply_patch(old, parts, io.BytesIO(data), tmp_path / "made")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ONNX")
    with pytest.raises(ArtifactError, match="no sound GGUF file"):
        segments(tmp_path / "a", tmp_path / "a")
