"""Kill -9 at a random moment in each stage: the build then ends as if nothing had happened.

EDGEDISTILL_KILL_ROUNDS=10 repeats every stage ten times; by default once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import FakeTeacher
from world import API_TEACHER, LOCAL_TEACHER, STAGES, World, make_world

from edgedistill.memory import SERVER_MODULE

ROUNDS = int(os.environ.get("EDGEDISTILL_KILL_ROUNDS", "1"))
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="process groups are a POSIX thing"),
    pytest.mark.timeout(600 * ROUNDS),
]


@pytest.fixture(scope="module")
def teacher() -> Iterator[FakeTeacher]:
    answer = lambda prompt: prompt.rsplit(" ", 1)[-1]  # noqa: E731
    with FakeTeacher(answer=answer, delay_seconds=0.02) as teacher:
        yield teacher


@pytest.fixture(scope="module", params=["api", "local"])
def kind(request: pytest.FixtureRequest, teacher: FakeTeacher) -> Mapping[str, Any]:
    return LOCAL_TEACHER if request.param == "local" else api(teacher)


def api(teacher: FakeTeacher) -> Mapping[str, Any]:
    return {**API_TEACHER, "base_url": teacher.base_url}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, kind: Mapping[str, Any]) -> World:
    world = make_world(tmp_path_factory.mktemp("unbroken"), kind)
    world.run()
    return world


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_killed_in_each_stage(
    tmp_path: Path, unbroken: World, kind: Mapping[str, Any], teacher: FakeTeacher, round_: int
) -> None:
    world, chance = make_world(tmp_path / "world", kind), random.Random(round_)
    before = len(teacher.requests)
    for stage in STAGES:
        kill_in(world, stage, chance.random() * duration(unbroken, stage))
        assert_no_server_is_left(world)
    world.run()
    assert world.digests() == unbroken.digests()
    # Each prompt once to collect, some once more to time (with a warm-up); a kill in one of these
    # two stages may cost the call that was in flight.
    assert len(teacher.requests) - before <= 48 + 4 + 3 + 2


def duration(unbroken: World, stage: str) -> float:
    folder = unbroken.stages().get(stage, unbroken.home / "dist" / "tiny-tiny")
    return float(json.loads((folder / "manifest.json").read_text("utf-8"))["wall_seconds"])


def kill_in(world: World, stage: str, after_seconds: float) -> None:
    """Start a build, wait until `stage` begins, and a moment later kill its process group."""
    process = subprocess.Popen(
        world.command(), cwd=world.home, env=world.environment(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            if line.startswith(f"{stage}:") and "reused" not in line:
                break
        time.sleep(after_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_local_server_dies_with_the_build_alone(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", LOCAL_TEACHER)
    process = subprocess.Popen(
        world.command("collect"), cwd=world.home, env=world.environment(),
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not servers(world) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert servers(world)
    process.kill()  # only this process: nobody tells the server
    process.wait()
    assert_no_server_is_left(world)


def assert_no_server_is_left(world: World) -> None:
    deadline = time.monotonic() + 10
    while servers(world) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not servers(world)


def servers(world: World) -> list[int]:
    """Local servers of this world; other worlds' tests may run at the same time."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.cwd() == str(world.home)
            if ours and SERVER_MODULE in process.cmdline():
                found.append(process.pid)
    return found
