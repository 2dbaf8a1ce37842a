"""Measures benchmarks/hot_paths in processes of their own, of one checkout or of two in turn."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgedistill import machine
from edgedistill.errors import RuntimeFailure, UsageError, did_you_mean
from edgedistill.measures import Measure, measure, percentile

ROOT = Path(__file__).resolve().parent.parent
HOT_PATHS = Path(__file__).resolve().parent / "hot_paths"
KEPT = 50  # rounds of a process; of more, so many quantiles
LAST_LINES = 15
Rounds = Mapping[str, Sequence[float]]  # seconds of one call by benchmark, without "test_"


@dataclass
class Side:
    """A checkout whose edgedistill is measured, and the rounds of its processes so far."""

    name: str
    tree: Path
    processes: list[Rounds] = field(default_factory=list)

    def figures(self) -> dict[str, Measure]:
        """Each benchmark over the processes that have it: the mean of their medians."""
        names = dict.fromkeys(name for rounds in self.processes for name in rounds)
        groups = {name: [each[name] for each in self.processes if name in each] for name in names}
        return {name: measure(held, "s", "p50") for name, held in groups.items()}


def measure_once(side: Side, tests: Sequence[str], seconds: float) -> None:
    """Hot paths, named as `find` does, in one new process.

    Raises:
        RuntimeFailure: one of them failed, or another edgedistill was measured.
    """
    with tempfile.TemporaryDirectory(prefix="edgedistill-benchmarks-") as folder:
        file = Path(folder) / "rounds.json"
        done = subprocess.run(
            [*_command(tests), f"--benchmark-max-time={seconds}", f"--benchmark-json={file}"],
            cwd=folder, env=_environment(side.tree), capture_output=True, text=True,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        if done.returncode != 0 or not file.is_file():
            lines = "\n  ".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
            raise RuntimeFailure(f"the hot paths of {side.name} failed:\n  {lines}")
        found = json.loads(file.read_text("utf-8"))
    measured = Path(found["machine_info"]["edgedistill"]).parent
    if measured != side.tree.resolve():
        raise RuntimeFailure(f"the edgedistill of {measured} was measured, not that of {side.tree}")
    side.processes.append(
        {_name(each["name"]): _thinned(each["stats"]["data"])
         for each in found["benchmarks"]}
    )  # fmt: skip


def find(only: Sequence[str]) -> dict[str, str]:
    """By name the hot paths whose name contains one of `only`, or all: each as pytest names it, so
    that no process loads what is not measured.

    Raises:
        UsageError: a word of `only` is in no name.
    """
    done = subprocess.run(
        [*_command([str(HOT_PATHS)]), "--collect-only", "-q"], cwd=HOT_PATHS,
        env=_environment(ROOT), capture_output=True, text=True, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode != 0 or not lines:
        said = (done.stdout + done.stderr)[-900:]
        raise RuntimeFailure(f"the hot paths cannot be read:\n  {said}")
    found = {}
    for line in lines:
        file, _, test = line.partition("::")
        found[_name(test)] = f"{HOT_PATHS / Path(file).name}::{test}"
    for word in only:
        if not any(word in name for name in found):
            hint = did_you_mean(word, {name.split("[")[0] for name in found}) or "see --list"
            raise UsageError(f"no hot path or script is named like {word!r}", hint=hint)
    return {k: v for k, v in found.items() if not only or any(word in k for word in only)}


def _name(test: str) -> str:
    return test.removeprefix("test_")


def _command(tests: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "pytest", *tests, "-o", "addopts=", "-p", "no:cacheprovider"]
    words += ["--timeout=0", "--benchmark-disable-gc", "--benchmark-warmup=on"]
    return [*words, "--benchmark-warmup-iterations=1", "--benchmark-min-rounds=5"]


def _environment(tree: Path) -> dict[str, str]:
    """The edgedistill of `tree`, and one thread: a second core's other work is not measured."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**machine.child_environment(), "PYTHONPATH": str(tree), **single}


def _thinned(values: Sequence[float]) -> list[float]:
    if len(values) <= KEPT:
        return list(values)
    return [percentile(values, place / (KEPT - 1)) for place in range(KEPT)]


@contextlib.contextmanager
def checked_out(ref: str) -> Iterator[tuple[Path, str]]:
    """A worktree of this repository at `ref`, and its commit; it is removed at the end.

    Raises:
        UsageError: there is no such ref, or this is no git repository.
    """
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="edgedistill-against-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree, commit
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"--against needs the program git: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or "there is no such commit, branch or tag"
        raise UsageError(f"git {words[0]} failed: {said}", where="--against")
    return done.stdout.strip()
