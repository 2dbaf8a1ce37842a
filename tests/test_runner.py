"""Which runner is made for which device."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from edgedistill import emulator, runner
from edgedistill.errors import MissingTool
from edgedistill.progress import Silent
from edgedistill.runner import ARM, X86, X86_MARCH, Build, build_for


@pytest.mark.parametrize(
    ("architecture", "features", "build"),
    [
        ("x86_64", ("avx2", "fma", "f16c", "avx512f"), Build(X86, X86_MARCH)),
        ("aarch64", ("asimd", "asimdhp", "asimddp", "i8mm"), emulator.PROCESSORS["phone"].build),
        ("arm64", ("asimd", "asimdhp", "asimddp"), emulator.PROCESSORS["board"].build),
        ("aarch64", ("asimd",), Build(ARM, "armv8-a")),  # a Raspberry Pi 4
    ],
)
def test_a_runner_by_what_the_processor_has(
    architecture: str, features: tuple[str, ...], build: Build
) -> None:
    assert build_for(architecture, features) == build


@pytest.mark.parametrize(
    ("architecture", "features", "said"),
    [
        ("x86_64", ("avx", "f16c"), "lacks avx2, fma"),
        ("armv7l", (), "no runner for a processor 'armv7l'"),
    ],
)
def test_a_device_that_no_runner_is_made_for(
    architecture: str, features: tuple[str, ...], said: str
) -> None:
    with pytest.raises(MissingTool, match=said) as refused:
        build_for(architecture, features)
    assert "--runner FILE" in str(refused.value)


@pytest.mark.skipif(runner.installed() not in runner.SOURCES, reason="no sources are pinned")
def test_what_only_times_is_not_in_the_identity_of_answers() -> None:
    own = runner.own_parts()
    for name in own:
        same = runner.sources({**own, name: "another"}) == runner.sources(own)
        assert same == (name in ("ceilings.h", "runner.cpp"))


@pytest.mark.skipif(sys.platform != "linux", reason="runners are compiled on Linux")
def test_what_is_missing_to_compile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ARM if platform.machine() == X86 else X86
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match=rf"{other}-linux-gnu-g\+\+, cmake, make not found"):
        runner.prepare(Build(other, "none"), Silent(), tmp_path)
    assert "g++, cmake, make not found" in (runner.problem(Build(platform.machine(), "x")) or "")
