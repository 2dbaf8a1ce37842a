"""Files on a device: once, by their hash, over connections that break, and gone at the end. The
device is this machine's own shell with another home."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from shells import LocalShell

from edgedistill.artifacts import digest_of_file
from edgedistill.devices import transfer
from edgedistill.devices.shell import Shell
from edgedistill.devices.transfer import Store
from edgedistill.errors import DeviceError, StorageError
from edgedistill.progress import Silent

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell here")
SHELLS = [("sh",), ("busybox", "sh"), ("bash", "--posix")]
SIZE = 3_000_000


@dataclass
class Notes(Silent):
    said: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "model.gguf"
    made.write_bytes(bytes(range(256)) * (SIZE // 256))
    return made


def store(home: Path, lose: Sequence[int] = (), sh: Sequence[str] = ("sh",)) -> Store:
    home.mkdir(exist_ok=True)
    made = Store(Shell(LocalShell(home, sh, list(lose))), Notes())
    made.open()
    return made


def programs(home: Path, **scripts: str) -> None:
    """Programs of its own, which go before this machine's."""
    (home / "bin").mkdir(parents=True)
    for name, script in scripts.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (home / "bin" / name).chmod(0o755)


def left(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*"))


@pytest.mark.parametrize("sh", SHELLS, ids=lambda sh: sh[0])
def test_a_copy_is_whole_and_then_gone(tmp_path: Path, file: Path, sh: Sequence[str]) -> None:
    if shutil.which(sh[0]) is None:
        pytest.skip(f"{sh[0]} is not installed")
    there = store(tmp_path / "at a home", sh=sh)
    copy = Path(there.put(file, "model", executable=True))
    assert copy.read_bytes() == file.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o700
    there.clean()
    assert left(tmp_path / "at a home") == []


def test_a_connection_that_breaks_twice_goes_on_where_it_was(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home", lose=[1000, 70_000])
    assert digest_of_file(Path(there.put(file, "model"))) == digest_of_file(file)
    assert len(there.progress.said) == 2  # type: ignore[attr-defined]
    there.clean()
    assert left(tmp_path / "home") == []


def test_one_that_never_gets_further_is_given_up(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home", lose=[1000, 0, 0, 0, 0])
    with pytest.raises(DeviceError, match="copying model: lost"):
        there.put(file, "model")
    (part,) = [name for name in left(tmp_path / "home") if name.endswith(".part")]
    assert (tmp_path / "home" / part).stat().st_size == 1000
    again = store(tmp_path / "home")  # as if this process had been killed
    assert again._state(digest_of_file(file), "").part == 1000
    again.put(file, "model")
    again.clean()
    assert left(tmp_path / "home") == []


def test_a_shell_with_the_programs_of_a_mac(tmp_path: Path, file: Path) -> None:
    wc = shutil.which("wc")
    programs(
        tmp_path / "home",
        stat="echo 'stat: illegal option -- c' >&2; exit 1",
        wc=f"printf '%8d\\n' $({wc} \"$@\")",  # it pads the number with blanks
    )
    there = store(tmp_path / "home", lose=[1000])
    copy = Path(there.put(file, "model"))
    assert copy.read_bytes() == file.read_bytes()
    assert there._state(copy.name, "").whole == file.stat().st_size
    there.clean()
    assert left(tmp_path / "home") == ["bin", "bin/stat", "bin/wc"]


@pytest.mark.parametrize("damage", ["part", "whole"])
def test_what_is_damaged_there_is_copied_again(tmp_path: Path, file: Path, damage: str) -> None:
    there, name = store(tmp_path / "home"), digest_of_file(file)
    size = file.stat().st_size
    lying = Path(there.folder) / (f"{name}.part" if damage == "part" else name)
    lying.write_bytes(bytes(size - 5 if damage == "part" else size))
    assert Path(there.put(file, "model")).read_bytes() == file.read_bytes()


def test_a_part_that_is_longer_than_the_file(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    (Path(there.folder) / f"{digest_of_file(file)}.part").write_bytes(bytes(SIZE + 1))
    assert Path(there.put(file, "model")).read_bytes() == file.read_bytes()


def test_what_is_kept_stays_and_is_not_copied_again(tmp_path: Path, file: Path) -> None:
    first = store(tmp_path / "home")
    inode = Path(first.put(file, "model")).stat().st_ino
    first.keep()
    first.clean()
    second = store(tmp_path / "home", lose=[0, 0, 0])  # a copy would break
    assert Path(second.put(file, "model")).stat().st_ino == inode
    second.clean()
    assert f".cache/edgedistill/{digest_of_file(file)}" in left(tmp_path / "home")


def test_what_another_sitting_asks_to_keep_meanwhile_stays(tmp_path: Path, file: Path) -> None:
    first, second = store(tmp_path / "home"), store(tmp_path / "home")
    first.put(file, "model")
    copy = Path(second.put(file, "model"))
    second.keep()
    first.clean()
    second.clean(asked_to_keep=True)
    assert copy.is_file()
    assert second.progress.said == []  # type: ignore[attr-defined]


def test_a_mark_whose_file_is_gone_keeps_nothing(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    (Path(there.folder) / f"{digest_of_file(file)}.kept").touch()
    there.put(file, "model")
    there.clean()
    assert left(tmp_path / "home") == []


def test_a_sitting_that_fails_before_it_keeps_says_so(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    there.put(file, "model")
    there.clean(asked_to_keep=True)
    (note,) = there.progress.said  # type: ignore[attr-defined]
    assert f"Removed from {there.folder}: {digest_of_file(file)[:12]}" in note
    assert left(tmp_path / "home") == []


def test_what_a_killed_sitting_left_is_used_and_removed(tmp_path: Path, file: Path) -> None:
    store(tmp_path / "home").put(file, "model")
    second = store(tmp_path / "home", lose=[0, 0, 0])
    second.put(file, "model")
    second.clean()
    assert left(tmp_path / "home") == []


def test_other_files_there_stay(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "home" / ".cache" / "edgedistill" / "weights" / "mine"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    there = store(tmp_path / "home")
    there.put(file, "model")
    there.clean()
    assert [name for name in left(tmp_path / "home") if name.endswith("mine")] == [
        ".cache/edgedistill/weights/mine"
    ]
    assert len(left(tmp_path / "home")) == 4


def test_no_space_is_told_before_anything_is_sent(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    df = (
        "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'\n"
        "echo '/dev/block/dm-5 100000 99000 1000 99% /data'"
    )
    programs(tmp_path / "home", df=df)
    with pytest.raises(StorageError, match=r"no space for model: 3.0 MB are needed, 1.0 MB free"):
        there.put(file, "model")
    assert list(Path(there.folder).iterdir()) == [Path(there.folder) / "parent.ours"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_midway(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    (Path(there.folder) / f"{digest_of_file(file)}.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space for model: "):
        there.put(file, "model")


@pytest.mark.skipif(sys.platform == "win32", reason="needs modes of POSIX")
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    with pytest.raises(DeviceError, match="no folder can be made there"):
        Store(Shell(LocalShell(tmp_path / "home")), Silent()).open()


def test_what_cannot_be_removed_is_named(tmp_path: Path, file: Path) -> None:
    there = store(tmp_path / "home")
    there.put(file, "model")
    shutil.move(tmp_path / "home", tmp_path / "elsewhere")
    there.clean()
    (note,) = there.progress.said  # type: ignore[attr-defined]
    assert "what was copied could not be removed" in note
    assert digest_of_file(file)[:12] in note
