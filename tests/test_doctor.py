"""The diagnosis: what is there, what is missing, and that a hint always says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill.doctor import PACKAGES, examine, loads, settings

HEAVY = ("torch", "transformers", "llama_cpp")


def test_examine_covers_every_area(tmp_path: Path) -> None:
    findings = examine(tmp_path / "not" / "there" / "yet")
    areas = {one.area for one in findings} - {"setting"}  # none need be set
    assert areas == {"machine", "runtime", "package", "tool", "weights"}
    named = {one.name: one for one in findings}
    assert {"cores", "memory", "disk", "gpu", "ollama", "compiler", *PACKAGES} <= set(named)
    assert all(one.hint for one in findings if one.state == "missing")


def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    findings = examine(tmp_path, packages={"no-such-package-at-all": "report"})
    (missing,) = [one for one in findings if one.name == "no-such-package-at-all"]
    assert missing.state == "missing"
    assert ".[report]" in missing.hint


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "exit code"),
        ("import no_such_library", "No module named 'no_such_library'"),
    ],
)
def test_a_runtime_that_dies_is_a_finding(code: str, said: str) -> None:
    finding = loads("0.0", code)
    assert finding.state == "missing"
    assert said in finding.value
    assert finding.hint


def test_a_runtime_that_loads() -> None:
    assert loads("1.2", "pass").state == "ok"


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from edgedistill.doctor import examine
examine(Path({str(tmp_path)!r}))
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_variable_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    given = {
        "EDGEDISTILL_WEIGHTS": f"{tmp_path}{os.pathsep}{tmp_path / 'typo'}",
        "EDGEDISTILL_BROWSER": sys.executable,
    }
    weights, browser = settings(given)
    assert (weights.state, browser.state) == ("note", "ok")
    assert weights.hint.startswith(f"nothing that can be used is at {tmp_path / 'typo'}: mend")
    assert list(settings({})) == []
