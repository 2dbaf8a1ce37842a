"""An environment of our own, really made: from a wheel on the disk, so without a network."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgedistill.artifacts import write_json
from edgedistill.errors import ArtifactError, MissingTool, RuntimeFailure
from edgedistill.own_environment import (
    COMPLETE,
    LISTS,
    OwnEnvironment,
    Pins,
    find,
    folder_of,
    prepare,
    read_pins,
    run_script,
)
from edgedistill.progress import Silent

SCRIPT = """\
import json, os, sys, time
request = json.loads(sys.stdin.readline())
if request["do"] == "die":
    print("what it said last", flush=True)
    os._exit(7)
if request["do"] == "wait":
    time.sleep(60)
answer = {"refuse": {"error": "no such thing"}, "full": {"error": "x", "errno": 28, "file": "f"}}
value = answer.get(request["do"], {"ok": [request.get("value"), "edgedistill" in sys.modules]})
open(sys.argv[1], "w").write(json.dumps(value))
"""


def wheel(folder: Path, name: str = "tinypin", version: str = "1.0") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as stream:
        stream.writestr(f"{name}.py", "VALUE = 42\n")
        stream.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        stream.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        stream.writestr(f"{info}/RECORD", "")


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pins:
    """A list of one package, which pip finds in a folder and nowhere else."""
    wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return listed(tmp_path, "tinypin==1.0\n")


def listed(folder: Path, text: str) -> Pins:
    file = folder / "tiny.txt"
    file.write_text(f"# a comment\n{text}", "utf-8")
    return read_pins(file)


@pytest.mark.timeout(1200)  # two real environments
def test_made_once_then_reused_and_made_again_when_torn(pins: Pins, tmp_path: Path) -> None:
    root = tmp_path / "environments"
    made = prepare(pins, Silent(), root)
    code = "import tinypin, sys; print(tinypin.VALUE, sys.prefix != sys.base_prefix)"
    done = subprocess.run([made.python, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["42", "True"]
    told = json.loads((made.folder / COMPLETE).read_text("utf-8"))
    assert "tinypin==1.0" in told["packages"]
    kept = made.folder / "kept"
    kept.touch()
    assert prepare(pins, Silent(), root) == made
    assert kept.exists()
    (made.folder / COMPLETE).unlink()  # as if the install had been killed
    assert find(pins, root) is None
    assert prepare(pins, Silent(), root) == made
    assert not kept.exists()


def test_what_pip_lacks_is_said_and_nothing_is_kept(pins: Pins, tmp_path: Path) -> None:
    missing = listed(tmp_path, "tinypin==2.0\n")
    with pytest.raises(MissingTool, match="pip cannot install the packages of tiny") as failure:
        prepare(missing, Silent(), tmp_path)
    assert "No matching distribution found for tinypin==2.0" in failure.value.what
    assert find(missing, tmp_path) is None


def test_without_a_network(pins: Pins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(MissingTool, match="no package index can be reached"):
        prepare(listed(tmp_path, "elsewhere==1.0\n"), Silent(), tmp_path)


def test_another_python(tmp_path: Path) -> None:
    old = listed(tmp_path, "# for Python 3.8 to 3.9\ntinypin==1.0\n")
    with pytest.raises(MissingTool, match=r"pinned for Python 3\.8 to 3\.9, this is 3\."):
        prepare(old, Silent(), tmp_path)


def test_every_package_has_an_exact_version(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not pinned: tinypin>=1"):
        listed(tmp_path, "tinypin>=1\n")


def test_other_packages_are_another_environment(tmp_path: Path) -> None:
    one = folder_of(listed(tmp_path, "a==1\nb==2\n"), tmp_path)
    assert folder_of(listed(tmp_path, "# other comment\nb==2\na==1\n"), tmp_path) == one
    assert folder_of(listed(tmp_path, "a==1\nb==3\n"), tmp_path) != one


@pytest.mark.parametrize("file", sorted(LISTS.glob("*.txt")), ids=lambda file: file.stem)
def test_our_lists(file: Path) -> None:
    pins = read_pins(file)
    assert pins.minors is not None
    assert "://" not in file.read_text("utf-8")
    names = [package.partition("==")[0].lower() for package in pins.packages]
    assert len(names) == len(set(names))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT, "utf-8")
    return file


def here(folder: Path) -> OwnEnvironment:
    return OwnEnvironment(folder, Path(sys.executable))


def test_a_script_answers(script: Path, tmp_path: Path) -> None:
    request = {"do": "this", "value": "née"}
    assert run_script(here(tmp_path), script, request, 60) == ["née", False]


@pytest.mark.parametrize(
    ("do", "seconds", "said"),
    [
        ("die", 60, "script: die ended with exit code 7.*\n *what it said last"),
        ("wait", 0.5, r"script: wait did not end within 0\.5 s"),
        ("refuse", 60, "no such thing"),
    ],
)
def test_a_script_that_fails(
    script: Path, tmp_path: Path, do: str, seconds: float, said: str
) -> None:
    with pytest.raises(RuntimeFailure, match=said):
        run_script(here(tmp_path), script, {"do": do, "value": 1}, seconds)


def test_a_full_disk_is_the_systems_error(script: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="28"):
        run_script(here(tmp_path), script, {"do": "full"}, 60)


def test_torn_marker_is_not_read(pins: Pins, tmp_path: Path) -> None:
    folder = folder_of(pins, tmp_path)
    folder.mkdir()
    write_json(folder / COMPLETE, {})
    assert find(pins, tmp_path) is None  # its Python is not there
