"""The commit that a folder is at, read from git's files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgedistill.commit import Commit, commit_of

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init")
    (folder / "a").write_text("1")
    git(folder, "add", "a")
    git(folder, "commit", "-m", "one")
    return folder


def found(folder: Path) -> Commit:
    commit = commit_of(folder)
    assert commit is not None
    return commit


def test_a_folder_deep_in_it_that_is_not_there_yet(repository: Path) -> None:
    commit = found(repository / "deep" / ".edgedistill")
    assert (commit.hash, commit.dirty) == (git(repository, "rev-parse", "HEAD"), False)
    assert commit.committed == git(repository, "show", "-s", "--format=%cI")
    (repository / "untracked").touch()
    assert found(repository).dirty is False
    (repository / "a").write_text("2")
    assert found(repository).dirty is True


@pytest.mark.parametrize(
    "words", [("pack-refs", "--all"), ("checkout", "--detach"), ("checkout", "-b", "deep/name")]
)
def test_every_way_that_git_writes_it(repository: Path, words: tuple[str, ...]) -> None:
    expected = git(repository, "rev-parse", "HEAD")
    git(repository, *words)
    assert found(repository).hash == expected


def test_a_worktree(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-b", "other", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "--allow-empty", "-m", "two")
    assert found(tmp_path / "tree").hash == git(tmp_path / "tree", "rev-parse", "HEAD")
    assert found(tmp_path / "tree").hash != found(repository).hash


def test_without_the_program_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert found(repository) == Commit(expected, None, None)


def test_what_the_environment_says_of_another_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = found(repository)
    git(tmp_path, "init", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "none"))
    assert found(repository) == expected


def test_no_repository_and_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    assert commit_of(tmp_path) is None


@pytest.mark.parametrize("head", [b"", b"\xff\xfe", b"ref: refs/heads/.invalid", b"ref: HEAD"])
def test_files_that_are_not_as_expected(tmp_path: Path, head: bytes) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_bytes(head)
    assert commit_of(tmp_path) is None


def test_a_worktree_whose_repository_is_gone(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: nowhere/at/all")
    assert commit_of(tmp_path) is None
