"""Stage folders: reused when complete, made again when torn, told about when damaged."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edgedistill.artifacts import (
    MANIFEST,
    RESUME,
    Identity,
    canonical,
    digest_of_file,
    load_finished,
    run_stage,
    storing,
    swap_folders,
    write_atomic,
)
from edgedistill.errors import ArtifactError, StorageError
from edgedistill.progress import Silent

IDENTITY = Identity("make", 1, {"size": 3}, {"source": "abc"}, {"tool": "1.0"})


@dataclass
class Work:
    """Writes one file and counts how often it was asked to."""

    text: str = "made"
    seen: list[list[str]] = field(default_factory=list)

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "part").mkdir()
        (folder / "part" / "made.txt").write_text(self.text, "utf-8")
        return {"length": len(self.text)}


def make(root: Path, work: Callable[[Path], dict[str, Any]], identity: Identity = IDENTITY) -> Any:
    return run_stage(identity, root, Silent(), work)


def test_a_complete_stage_is_reused(tmp_path: Path) -> None:
    work = Work()
    first, second = make(tmp_path, work), make(tmp_path, work)
    assert len(work.seen) == 1
    assert (first.reused, second.reused) == (False, True)
    assert (second.digest, second.facts) == (first.digest, {"length": 4})


def test_the_manifest_says_what_was_made_from_what(tmp_path: Path) -> None:
    done = make(tmp_path, Work())
    manifest = json.loads((done.folder / MANIFEST).read_text("utf-8"))
    made = done.folder / "part" / "made.txt"
    listed = {"part/made.txt": {"sha256": digest_of_file(made), "bytes": 4}}
    assert manifest["outputs"] == listed
    assert (manifest["inputs"], manifest["spec"]) == ({"source": "abc"}, {"size": 3})
    assert manifest["tools"] == {"tool": "1.0"}
    assert manifest["wall_seconds"] >= 0
    assert manifest["peak_memory_bytes"] > 1 << 20


@pytest.mark.parametrize(
    "change",
    [{"stage": "other"}, {"version": 2}, {"spec": {"size": 4}}, {"inputs": {"source": "abd"}},
     {"tools": {"tool": "1.1"}}],
)  # fmt: skip
def test_whatever_shapes_a_result_names_its_folder(change: dict[str, Any]) -> None:
    assert replace(IDENTITY, **change).key != IDENTITY.key


def test_equal_content_gives_equal_digests_in_other_folders(tmp_path: Path) -> None:
    one = make(tmp_path, Work())
    other = make(tmp_path, Work(), replace(IDENTITY, version=2))
    changed = make(tmp_path, Work("unlike"), replace(IDENTITY, version=3))
    assert one.folder != other.folder
    assert one.digest == other.digest != changed.digest


def test_a_torn_folder_is_cleared_except_for_resume(tmp_path: Path) -> None:
    folder = IDENTITY.folder(tmp_path)
    (folder / RESUME).mkdir(parents=True)
    (folder / RESUME / "checkpoint").write_text("half way")
    (folder / "half").write_text("torn")
    (folder / "sub").mkdir()
    (folder / "sub" / "torn").write_text("torn")
    work = Work()
    done = make(tmp_path, work)
    assert work.seen == [[RESUME]]
    assert sorted(path.name for path in done.folder.iterdir()) == [MANIFEST, "part"]


def test_work_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("torn")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make(tmp_path, fail)
    assert load_finished(IDENTITY.folder(tmp_path), reused=True) is None
    assert (IDENTITY.folder(tmp_path) / "half").is_file()  # left for inspection


def damage_size(folder: Path) -> None:
    (folder / "part" / "made.txt").write_text("longer than before")


def damage_absence(folder: Path) -> None:
    (folder / "part" / "made.txt").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


@pytest.mark.parametrize("damage", [damage_size, damage_absence, damage_manifest])
def test_a_damaged_stage_is_told_not_used(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(make(tmp_path, Work()).folder)
    with pytest.raises(ArtifactError, match="changed from outside") as caught:
        make(tmp_path, Work())
    assert "delete this folder" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full", "model.gguf"), "No space left"),
        (PermissionError(errno.EACCES, "no", "model.gguf"), "Permission denied"),
        (RuntimeError("Error while serializing: I/O error (os error 28)"), "No space left"),
    ],
)
def test_storing_names_what_the_disk_refused(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught, storing(tmp_path):
        raise error
    assert caught.value.where in ("model.gguf", str(tmp_path))
    assert caught.value.hint


def test_a_writer_that_fails_without_a_word_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file data/3")
    with pytest.raises(RuntimeError, match="Pytorch"), storing(tmp_path):
        raise error
    monkeypatch.setattr("edgedistill.artifacts.stages.FULL_DISK_BYTES", 1 << 62)  # any disk is full
    with pytest.raises(StorageError, match="No space left"), storing(tmp_path / "not" / "there"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), ValueError("other")])
def test_storing_lets_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storing(tmp_path):
        raise error
    assert caught.value is error


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old")
    with pytest.raises(TypeError):
        write_atomic(file, "not bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_whose_successor_cannot_be_moved_stays(tmp_path: Path) -> None:
    folder, old = tmp_path / "bundle", tmp_path / ".bundle.old"
    folder.mkdir()
    (folder / "file").write_text("old", "utf-8")
    with pytest.raises(FileNotFoundError):
        swap_folders(tmp_path / "nothing", folder, old)
    assert (folder / "file").read_text("utf-8") == "old"
    new = tmp_path / ".bundle.making"
    new.mkdir()
    swap_folders(new, folder, old)
    assert not list(folder.iterdir())
    assert (old / "file").is_file()


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical({"b": [1, "é"], "a": None}) == canonical({"a": None, "b": [1, "é"]})
