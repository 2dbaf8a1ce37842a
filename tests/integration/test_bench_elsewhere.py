"""`bench MODEL --device`, end to end: by a real sshd, by a real adb, and under QEMU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sshd
import tiny
from adb_device import AdbDevice
from shells import stand_in
from sshd import Sshd

from edgedistill import emulator, machine, runner
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.progress import Silent
from edgedistill.result_file import read_result
from edgedistill.student import TOKENIZER_GGUF

pytestmark = pytest.mark.integration
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder, says="Sure")
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    lines = [{"id": f"p{i}", "prompt": f"canoe {i}", "reference": "Sure"} for i in range(3)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if why := sshd.problem():
        pytest.skip(why)
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.end()


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdbDevice]:
    """A device that adb is connected to; its server is one of our own."""
    if shutil.which("adb") is None or sys.platform == "win32":
        pytest.skip("needs adb (Debian: adb) and a POSIX shell")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(runner.cache_folder().parent))
    monkeypatch.setenv("HOME", str(tmp_path))  # adb makes a key there
    device = AdbDevice(tmp_path / "phone")
    subprocess.run(["adb", "connect", device.serial], check=True, capture_output=True)
    yield device
    device.vanish()
    subprocess.run(["adb", "kill-server"], check=False, capture_output=True)


def words(model: Path, address: str, out: Path, *more: str) -> list[str]:
    asked = ["--threads", "1", "--repeats", "2", "--device", address]
    asked += ["--workspace", str(out.parent / "w"), "-o", str(out), *more]
    return [sys.executable, "-m", "edgedistill", "bench", str(model), *asked]


def own_runner(folder: Path) -> list[str]:
    """Ours where it was compiled before, else what answers in its place."""
    facts = machine.facts()
    build = runner.build_for(facts["architecture"], facts["cpu_features"])
    return [] if runner.cached(build) else ["--runner", str(stand_in(folder))]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def left(home: Path) -> list[str]:
    return [path.relative_to(home).as_posix() for path in home.rglob("*")]


def test_by_ssh(server: Sshd, model: Path, tmp_path: Path) -> None:
    (server.home / ".bashrc").write_text("echo Welcome; printf 'no line end'\n")
    out, prompts = tmp_path / "r.json", str(model.with_name("prompts.jsonl"))
    own = own_runner(tmp_path)
    knows_ceilings = not own
    asked = words(model, server.address, out, "--prompts", prompts, "--max-tokens", "8", *own)
    done = subprocess.run(
        [*server.inside, *asked], env=server.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = read_result(out)
    assert found.device["address"] == server.address
    assert found.device["fingerprint"] == machine.fingerprint()
    assert found.load["during"] is not None
    assert any("the device's own" in note for note in found.notes)
    for name in ("pp512", "tg128", "load", "peak_memory", "end_to_end_p50", "inter_token_p99"):
        assert found.figures[name].value > 0
    assert (found.roofline is not None) == knows_ceilings  # the stand-in does not
    assert found.likeness is not None
    assert [row["answer"] for row in found.likeness["rows"]] == ["Sure"] * 3
    assert left(server.home) == [".bashrc"]
    (server.home / ".bashrc").unlink()


def test_a_copy_by_ssh_that_is_cut_off_twice(server: Sshd, model: Path, tmp_path: Path) -> None:
    size, folder = model.stat().st_size, server.home / ".cache" / "edgedistill"
    command = [*server.inside, *words(model, server.address, tmp_path / "r.json")]
    command += ["--runner", str(stand_in(tmp_path))]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=server.environment, stderr=subprocess.PIPE, text=True)

    def sent() -> int:
        return max((part.stat().st_size for part in folder.glob("*.part")), default=0)

    server.slow("6mbit")
    ours = start()
    until(lambda: sent() > size // 5)
    first = sent()
    kill_copying(ours.pid)  # ssh dies, and we go on
    until(lambda: sent() > first + size // 5)
    ours.kill()  # we die
    assert "trying again" in ours.communicate()[1]
    second = sent()
    assert first < second < size
    server.fast()
    done = subprocess.run(command, env=server.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_result(tmp_path / "r.json").figures["tg128"].value > 0
    assert left(server.home) == []


def kill_copying(parent: int) -> None:
    """kill -9 of the ssh below `parent` that copies."""
    import psutil

    for child in psutil.Process(parent).children(recursive=True):
        if any("cat >>" in word for word in child.cmdline()):
            child.send_signal(signal.SIGKILL)


def test_ctrl_c_leaves_nothing_there(server: Sshd, model: Path, tmp_path: Path) -> None:
    server.slow("6mbit")
    command = [*server.inside, *words(model, server.address, tmp_path / "r.json")]
    ours = subprocess.Popen(
        [*command, "--runner", str(stand_in(tmp_path))],
        env=server.environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until(lambda: any((server.home / ".cache" / "edgedistill").glob("*.part")))
    os.killpg(ours.pid, signal.SIGINT)
    ours.communicate(timeout=WAIT_SECONDS)
    server.fast()
    assert ours.returncode != 0
    assert left(server.home) == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ssh://127.0.0.1:2223", "nothing answers at this port"),
        ("ssh://nobody@127.0.0.1:2222", "the device lets no key of yours in"),
        ("ssh://localhost:2222", "the host's key is not known"),
    ],
)
def test_an_ssh_that_does_not_work(
    server: Sshd, model: Path, tmp_path: Path, address: str, said: str
) -> None:
    done = subprocess.run(
        [*server.inside, *words(model, address, tmp_path / "r.json")],
        env=server.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_by_adb(phone: AdbDevice, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    asked = words(model, "adb://", out, "--keep-on-device", *own_runner(tmp_path))
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_result(out)
    assert found.device["address"] == f"adb://{phone.serial}"
    assert (found.device["model"], found.device["os"]) == ("Test Phone", "Android 14")
    assert found.conditions["before"]["power"] == "mains"
    assert found.figures["pp512"].value > 0
    kept = left(phone.tmp / "edgedistill")
    assert len(kept) == 4  # two files, each with a note that it is kept


def test_an_android_device_that_is_pulled_out(
    phone: AdbDevice, model: Path, tmp_path: Path
) -> None:
    asked = words(model, f"adb://{phone.serial}", tmp_path / "r.json")
    ours = subprocess.Popen(
        [*asked, "--runner", str(stand_in(tmp_path))], stderr=subprocess.PIPE, text=True
    )
    until(lambda: any(name for name in left(phone.tmp) if name.count("/") and "." not in name))
    phone.vanish()
    said = ours.communicate(timeout=WAIT_SECONDS)[1]
    assert ours.returncode == 1, said
    assert phone.serial in said
    assert "Traceback" not in said
    assert "what was copied could not be removed" in said


def test_an_android_device_that_does_not_trust_us(
    phone: AdbDevice, model: Path, tmp_path: Path
) -> None:
    other = AdbDevice(tmp_path / "other", trusts=False)
    subprocess.run(["adb", "connect", other.serial], check=False, capture_output=True)
    for address, told in (
        ("adb://", "adb sees 2 devices"),
        (f"adb://{other.serial}", "allow USB debugging"),
        ("adb://nowhere", "and not nowhere"),
    ):
        asked = words(model, address, tmp_path / "r.json")
        done = subprocess.run(asked, capture_output=True, text=True)
        assert (done.returncode, told in done.stderr) == (1, True), done.stderr
    other.vanish()


@pytest.mark.timeout(1200)  # emulated, so slow
def test_emulated(model: Path, tmp_path: Path) -> None:
    if emulator.cached("phone") is None:
        pytest.skip(emulator.emulator_problem() or "not compiled yet for 'phone'")
    out, prompts = tmp_path / "r.json", str(model.with_name("prompts.jsonl"))
    asked = [sys.executable, "-m", "edgedistill", "bench", str(model), "--repeats", "2"]
    asked += ["--device", "emulated://phone", "--prompts", prompts, "--sample", "2"]
    asked += ["--max-tokens", "4", "-o", str(out), "--workspace", str(tmp_path / "w")]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_result(out)
    assert found.figures == {}
    assert any("nothing was timed" in note for note in found.notes)
    assert (found.load["busy"], found.device["architecture"]) == (None, "aarch64")
    assert found.likeness is not None
    assert {row["answer"] for row in found.likeness["rows"]} == {"Sure"}
