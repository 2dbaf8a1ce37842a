"""What goes wrong for real users: each gives a clear message, its exit code, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTeacher
from world import API_TEACHER, LOCAL_TEACHER, RECIPE, TARGET, World, make_world

pytestmark = pytest.mark.integration
NOBODY = {**API_TEACHER, "base_url": "http://127.0.0.1:9/v1"}


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    answer = lambda prompt: prompt.rsplit(" ", 1)[-1]  # noqa: E731
    with FakeTeacher(answer=answer, delay_seconds=0.03) as teacher:
        yield teacher


def failing(world: World, verb: str, code: int, *said: str) -> None:
    done = world.run(verb, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


def recipe(world: World, **changes: Any) -> None:
    file = world.home / "recipe" / "recipe.yaml"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def test_an_unreachable_teacher(tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", NOBODY)
    recipe(world, collect={"attempts": 2, "backoff_seconds": 0.05})
    failing(world, "collect", 1, "http://127.0.0.1:9/v1")


def test_a_wrong_key(tmp_path: Path, teacher: FakeTeacher, monkeypatch: Any) -> None:
    world = make_world(tmp_path / "w", {**API_TEACHER, "base_url": teacher.base_url})
    recipe(world, teacher={**API_TEACHER, "base_url": teacher.base_url, "api_key_env": "WRONG"})
    monkeypatch.setenv("WRONG", "not-the-key")
    failing(world, "collect", 1, "WRONG")
    assert teacher.calls == 1


def test_a_key_that_is_not_set(tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", {**NOBODY, "api_key_env": "NOWHERE_SET"})
    failing(world, "collect", 1, "NOWHERE_SET")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        world = make_world(tmp_path / "w", {**LOCAL_TEACHER, "port": port})
        failing(world, "collect", 1, str(port), "teacher.port")


def test_a_memory_budget_that_nothing_meets(tmp_path: Path, teacher: FakeTeacher) -> None:
    world = make_world(tmp_path / "w", {**API_TEACHER, "base_url": teacher.base_url})
    world.target.write_text(json.dumps({**TARGET, "memory_budget_mb": 0.5}), "utf-8")
    failing(world, "quantize", 3, "'quantize'", "memory", "Q4_0", "Q8_0")
    left = json.loads(next(world.workspace.glob("quantize-*/candidates.json")).read_text("utf-8"))
    assert [entry["passed"] for entry in left] == [False, False]


def test_a_full_disk(tmp_path: Path, teacher: FakeTeacher) -> None:
    world = make_world(tmp_path / "w", {**API_TEACHER, "base_url": teacher.base_url})
    world.workspace.mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(world.workspace)]
    if os.name == "nt" or subprocess.run(size, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be made by root on Linux")
    try:
        failing(world, "build", 1, "No space left", "free some space")
        calls = teacher.calls
        remount = ["mount", "-o", "remount,size=200m", str(world.workspace)]
        subprocess.run(remount, check=True)
        world.run("distill")
        assert teacher.calls == calls
    finally:
        subprocess.run(["umount", str(world.workspace)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent another way there")
def test_ctrl_c_in_each_long_stage(tmp_path: Path, teacher: FakeTeacher) -> None:
    world = make_world(tmp_path / "w", {**API_TEACHER, "base_url": teacher.base_url})
    recipe(world, distill={**RECIPE["distill"], "epochs": 12})
    for stage in ("collect", "distill", "quantize", "bench"):
        code, said = interrupted(world, stage)
        assert code == 130, said
        assert "Traceback" not in said
        assert "run the same command again" in said
    world.run()
    assert teacher.calls <= 48 + 4 + 3 + 2


def interrupted(world: World, stage: str) -> tuple[int, str]:
    process = subprocess.Popen(
        world.command(), cwd=world.home, env=world.environment(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{stage}:") and "reused" not in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    return process.wait(), said
