from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill import machine

X86 = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma sse4_2\n\nmodel name\t: B\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd4b\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name", "features"),
    [
        (X86, "Some CPU @ 2 GHz", ["sse4_2", "avx2", "fma"]),
        (ARM, "0xd4b", ["asimd", "asimddp", "i8mm"]),
        ("", "unknown", []),
    ],
)
def test_cpu_name_and_features(cpuinfo: str, name: str, features: list[str]) -> None:
    assert machine.cpu_of(cpuinfo) == (name, features)


def test_facts_are_plain_json_of_a_real_machine() -> None:
    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["memory_bytes"] > 2**28
    assert 1 <= machine.threads() <= facts["logical_cores"]
    assert facts["fingerprint"] == machine.fingerprint()


def test_fingerprint_ignores_a_few_megabytes_and_sees_another_cpu() -> None:
    here = {"cpu": "A", "memory_bytes": 16_000_000_000}
    digest = machine.hardware_digest(here, "Linux")
    assert machine.hardware_digest({**here, "memory_bytes": 16_001_000_000}, "Linux") == digest
    assert machine.hardware_digest({**here, "cpu": "B"}, "Linux") != digest
    assert machine.hardware_digest(here, "Darwin") != digest


def test_a_child_takes_no_module_from_the_folder_it_is_started_in(tmp_path: Path) -> None:
    for name in ("json", "edgedistill"):  # a user's own script of such a name
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    code = "import edgedistill.errors, json; print(json.dumps('found'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=machine.child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == '"found"\n', done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="swap grows as it is needed elsewhere")
def test_a_container_s_bound_is_the_memory_there_is(tmp_path: Path) -> None:
    if machine.facts()["gpus"]:
        assert machine.memory_bytes(tmp_path) is None
        return
    whole = machine.memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n", "ascii")
    assert machine.memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1000\n", "ascii")
    bound = machine.memory_bytes(tmp_path)
    assert whole is not None
    assert bound is not None
    assert whole - bound == machine.facts()["memory_bytes"] - 1000  # swap is in both
