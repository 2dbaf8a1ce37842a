"""Kill -9 at a random moment in each stage: the build then ends as if nothing had happened.

EDGEDISTILL_KILL_ROUNDS=10 repeats every stage ten times; by default once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import FakeTeacher
from world import API_TEACHER, LOCAL_TEACHER, STAGES, World, make_world

from edgedistill.artifacts import MANIFEST
from edgedistill.memory import SERVER_MODULE
from edgedistill.recipe import CollectSpec

ROUNDS = int(os.environ.get("EDGEDISTILL_KILL_ROUNDS", "1"))
PROMPTS = 48
# Calls in flight when a build dies: as many as collect may have open; in bench one, or a warm-up.
LOST = {"collect": CollectSpec().concurrency, "bench": 2}
pytestmark = [
    pytest.mark.integration,
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
    world = make_world(tmp_path_factory.mktemp("unbroken"), kind, PROMPTS)
    world.run()
    return world


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_killed_in_each_stage(
    tmp_path: Path, unbroken: World, kind: Mapping[str, Any], teacher: FakeTeacher, round_: int
) -> None:
    world, chance = make_world(tmp_path / "world", kind, PROMPTS), random.Random(round_)
    before, lost = len(teacher.requests), 0
    paid: dict[str, str] = {}
    for stage in STAGES:
        tries = kill_in(world, stage, chance.random() * duration(unbroken, stage))
        lost += tries * LOST.get(stage, 0)
        assert_no_server_is_left(world)
        assert paid.items() <= answered(world).items()
        paid = answered(world)
    world.run()
    assert world.digests() == unbroken.digests()
    assert paid.items() <= answered(world).items()
    # Each prompt once to collect; four once more to time, behind a warm-up that is not kept.
    assert len(teacher.requests) - before <= PROMPTS + 4 + 1 + lost


def duration(unbroken: World, stage: str) -> float:
    manifest = unbroken.stages().get(stage, unbroken.bundle) / MANIFEST
    return float(json.loads(manifest.read_text("utf-8"))["wall_seconds"])


def kill_in(world: World, stage: str, after_seconds: float) -> int:
    """Kill a build's process group `after_seconds` into `stage`; returns how often that was tried.

    A stage that was complete by then is taken away, with all that the build made behind it, and
    killed earlier, until it is torn.
    """
    for tries in itertools.count(1):
        kill_build(world, stage, after_seconds)
        complete = place(world, stage)
        if complete is None or not (complete / MANIFEST).is_file():
            return tries
        for later in STAGES[STAGES.index(stage) :]:
            if (made := place(world, later)) is not None:
                shutil.rmtree(made, ignore_errors=True)
        after_seconds /= 2
    raise AssertionError


def place(world: World, stage: str) -> Path | None:
    return world.bundle if stage == "pack" else world.stages().get(stage)


def kill_build(world: World, stage: str, after_seconds: float) -> None:
    process = subprocess.Popen(
        world.command(), cwd=world.home, env=world.environment(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    with process.stderr as lines:
        said = []
        for line in lines:
            said.append(line)
            if line.startswith(f"{stage}:") and "reused" not in line:
                break
        else:
            raise AssertionError(f"the build never came to {stage}:\n{''.join(said)}")
        time.sleep(after_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answered(world: World) -> dict[str, str]:
    """Request key and whole trace, with the time it was asked at, of every answer in the store."""
    store = world.workspace / "traces.db"
    if not store.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(store)) as database:
        bodies = [json.loads(body) for (body,) in database.execute("SELECT body FROM traces")]
    return {body["key"]: json.dumps(body) for body in bodies if body["failure"] is None}


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
