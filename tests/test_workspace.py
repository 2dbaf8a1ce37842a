"""What a workspace holds, and what gc removes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edgedistill.artifacts import Identity, run_stage
from edgedistill.errors import StorageError
from edgedistill.progress import Silent
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.target import Target
from edgedistill.workspace import gc, holds, in_use, locked, reached, traces_bytes, unreached


def stage(root: Path, name: str, *, torn: bool = False) -> Path:
    """A real stage folder of 100 bytes, or one whose work died half-way."""

    def work(folder: Path) -> dict[str, int]:
        (folder / "data.bin").write_bytes(b"x" * 100)
        if torn:
            raise KeyboardInterrupt
        return {}

    identity = Identity(name, 1, {}, {})
    if torn:
        with pytest.raises(KeyboardInterrupt):
            run_stage(identity, root, Silent(), work)
        return identity.folder(root)
    return run_stage(identity, root, Silent(), work).folder


def test_holds_complete_and_torn(tmp_path: Path) -> None:
    merged, torn = stage(tmp_path, "merge"), stage(tmp_path, "export", torn=True)
    (tmp_path / "my-notes").mkdir()
    found = {one.stage: one for one in holds(tmp_path, {merged.resolve(): {"tiny"}})}
    assert set(found) == {"merge", "export"}
    assert found["merge"].complete
    assert found["merge"].recipes == ("tiny",)
    assert not found["export"].complete
    assert (found["export"].folder, found["export"].bytes) == (torn, 100)
    assert found["export"].age_seconds < 60


def test_holds_of_no_workspace(tmp_path: Path) -> None:
    assert holds(tmp_path / "absent", {}) == []
    assert traces_bytes(tmp_path / "absent") == 0


def test_gc_keeps_what_is_reached_and_the_traces(tmp_path: Path) -> None:
    kept, going_on = stage(tmp_path, "merge"), stage(tmp_path, "distill", torn=True)
    old, torn = stage(tmp_path, "export"), stage(tmp_path, "quantize", torn=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "traces.db").write_bytes(b"paid for")
    reach = {kept.resolve(): {"tiny"}, going_on.resolve(): {"tiny"}}
    condemned = unreached(holds(tmp_path, reach))
    assert gc(tmp_path, condemned) == sum(one.bytes for one in condemned) > 200
    assert not old.exists()
    assert not torn.exists()
    assert kept.is_dir()
    assert going_on.is_dir()
    assert notes.is_dir()
    assert traces_bytes(tmp_path) == len(b"paid for")


def test_gc_removes_traces_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "traces.db").write_bytes(b"1234")
    (tmp_path / "traces.db-wal").write_bytes(b"12")
    (tmp_path / "traces.db-of-may").write_bytes(b"a copy of the user's")
    assert gc(tmp_path, [], traces=True) == 6
    assert traces_bytes(tmp_path) == 0
    assert (tmp_path / "traces.db-of-may").is_file()


def test_gc_does_not_run_during_a_build(tmp_path: Path) -> None:
    old = stage(tmp_path, "export")
    with locked(tmp_path), pytest.raises(StorageError, match="another build"):
        gc(tmp_path, holds(tmp_path, {}))
    assert old.is_dir()
    gc(tmp_path, holds(tmp_path, {}))  # the lock is free again
    assert not old.exists()


def test_a_running_build_is_seen(tmp_path: Path) -> None:
    assert not in_use(tmp_path / "nowhere")
    with locked(tmp_path):
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    (tmp_path / "lock.db").write_bytes(b"no database at all" * 100)
    assert not in_use(tmp_path)


def test_a_workspace_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "lock.db").write_bytes(b"no database at all" * 100)
    with (
        pytest.raises(StorageError, match="cannot be locked: file is not a database"),
        locked(tmp_path),
    ):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Not a directory"), locked(tmp_path / "file" / "below"):
        pass


def test_reached_merges_plans(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny)
    other = recipe.model_copy(update={"name": "other"})

    def plan(of: Recipe, targets: Sequence[Target]) -> list[tuple[str, str, Path]]:
        own = ("distill", "would run", tmp_path / f"distill-{of.name}")
        return [("collect", "reused", tmp_path / "collect-0"), own]

    assert reached(plan, [recipe, other], []) == {
        (tmp_path / "collect-0").resolve(): {"tiny", "other"},
        (tmp_path / "distill-tiny").resolve(): {"tiny"},
        (tmp_path / "distill-other").resolve(): {"other"},
    }
