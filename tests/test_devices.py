"""Addresses of devices, what their transports say, and what is read from them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
from shells import LocalShell, stand_in

from edgedistill import machine
from edgedistill.devices import place_at
from edgedistill.devices.adb import Adb
from edgedistill.devices.address import Address, read_address
from edgedistill.devices.elf import require_fit
from edgedistill.devices.facts import CORES, PRESENT, facts_of
from edgedistill.devices.place import DevicePlace, device
from edgedistill.devices.readings import Readings, ticks_of
from edgedistill.devices.shell import BEGIN, END, Shell
from edgedistill.devices.ssh import Ssh
from edgedistill.errors import DeviceError, RuntimeFailure, UsageError
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.model_prompt import asked_model
from edgedistill.progress import Silent, SilentTask, Task
from edgedistill.result_file import read_result, write_result
from edgedistill.sitting import Plan, sit
from edgedistill.student import TOKENIZER_GGUF

needs_sh = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell here")
needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("local", Address("local")),
        ("ssh://pi", Address("ssh", "pi")),
        ("ssh://me@Host.example:8022", Address("ssh", "Host.example", "me", 8022)),
        ("ssh://[::1]:22", Address("ssh", "::1", None, 22)),
        ("ssh://[::1]", Address("ssh", "::1")),
        ("ssh://pi:022", Address("ssh", "pi", None, 22)),
        ("ssh://pi:", Address("ssh", "pi")),
        ("adb://", Address("adb")),
        ("adb://192.168.0.7:5555", Address("adb", "192.168.0.7:5555")),
        ("emulated://phone", Address("emulated", "phone")),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    assert read_address(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sssh://pi", "did you mean ssh?"),
        ("pi", "give one of: local, ssh"),
        ("ssh://", "names no host"),
        ("ssh://-oProxyCommand=touch", "names no host"),
        ("ssh://-oX@pi", "no user's name"),
        ("ssh://me:secret@pi", "use a key"),
        ("ssh://pi/home", "nothing may stand behind the host"),
        ("ssh://pi:99999", "Port out of range"),
        ("ssh://pi:0", "no port 0"),
        ("ssh://pi:22:", "Port could not be cast"),
        ("adb://a b", "no serial number"),
        ("adb://-s", "no serial number"),
    ],
)
def test_an_address_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_address(text)
    assert said in str(refused.value)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client")
def test_ssh_asks_nobody_and_hands_on_one_quoted_word() -> None:
    words = Ssh(Address("ssh", "pi", "me", 8022)).words("echo 'a b'")
    assert words[1:3] == ["-T", "-o"]
    assert "BatchMode=yes" in words
    assert words[-7:-1] == ["-p", "8022", "-l", "me", "--", "pi"]
    told = subprocess.run(["sh", "-c", words[-1]], capture_output=True, text=True, check=True)
    assert told.stdout == "a b\n"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("x\nHost key verification failed.", "compare the key that is shown: ssh -p 8022 me@pi"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", "ssh-keygen -R"),
        ("me@pi: Permission denied (publickey).", "ssh-copy-id"),
        ("ssh: Could not resolve hostname pi: Name or service not known", "alias"),
        ("ssh: connect to host pi port 8022: Connection refused", "start sshd there"),
        ("ssh: connect to host pi port 8022: Connection timed out", "is it awake"),
        ("Timeout, server pi not responding.", "server pi not responding"),
        ("", "ended without a word"),
    ],
)
def test_what_ssh_says_becomes_what_to_do(said: str, told: str) -> None:
    error = Ssh(Address("ssh", "pi", "me", 8022)).blame(said)
    assert str(error).startswith("ssh://me@pi:8022: ")
    assert told in str(error)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("adb: device 'X' not found", "cable in?"),
        ("adb: device offline", "adb reconnect"),
        ("adb: device unauthorized.", "allow USB debugging"),
        ("error: target doesn't support PTY args -Tt", "Android 7"),
        ("error: closed", "adb -s X shell echo hello"),
    ],
)
def test_what_adb_says_becomes_what_to_do(said: str, told: str) -> None:
    assert told in str(Adb("X").blame(said))


@pytest.mark.parametrize(
    ("head", "there", "fits"),
    [
        (b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7\x00", "aarch64", True),
        (b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7\x00", "x86_64", False),
        (b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\x00", "amd64", True),
        (b"\xcf\xfa\xed\xfe" + bytes(20), "arm64", True),  # a Mac's: it does not tell
        (b"#!/bin/sh", "x86_64", True),
    ],
)
def test_a_runner_for_another_processor(
    tmp_path: Path, head: bytes, there: str, fits: bool
) -> None:
    (tmp_path / "runner").write_bytes(head)
    if fits:
        require_fit(tmp_path / "runner", there)
        return
    with pytest.raises(UsageError, match="is for aarch64, and the device is x86_64"):
        require_fit(tmp_path / "runner", there)


def test_what_a_phone_is() -> None:
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd4b\n\nprocessor\t: 1\n"
    files = {
        "/proc/cpuinfo": arm,
        "/proc/meminfo": "MemTotal:        7654321 kB\n",
        "uname -sr": "Linux 6.1\n",
        "uname -m": "aarch64\n",
        CORES: "2\n",
        "getprop ro.product.model": "Some Phone\n",
        "getprop ro.build.version.release": "14\n",
        "getprop ro.soc.model": "SM8550\n",
    }
    facts = facts_of(files)
    assert (facts["cpu"], facts["model"], facts["os"]) == ("SM8550", "Some Phone", "Android 14")
    assert facts["cpu_features"] == ["asimd", "asimddp", "i8mm"]
    assert (facts["usable_cores"], facts["memory_bytes"]) == (2, 7654321 * 1024)
    assert facts_of({**files, CORES: "1\n"})["fingerprint"] != facts["fingerprint"]


def test_a_phone_whose_cores_sleep_is_the_same_phone() -> None:
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

    def facts_awake(cores: int, architecture: str = "aarch64") -> dict[str, Any]:
        files = {
            "/proc/cpuinfo": "".join(f"processor\t: {i}\n\n" for i in range(cores)),
            "uname -m": f"{architecture}\n",
            CORES: f"{cores}\n",
            PRESENT: "0-5,7-8\n",
        }
        return facts_of(files | {topology.format(i): f"{i}\n" for i in range(cores)})

    awake, asleep = facts_awake(8), facts_awake(3)
    assert asleep["fingerprint"] == awake["fingerprint"]
    assert (asleep["logical_cores"], asleep["physical_cores"]) == (8, 8)
    assert (asleep["usable_cores"], asleep["threads"]) == (3, 3)
    # Elsewhere somebody has switched them off, and the machine itself does not count them.
    assert facts_awake(3, "x86_64")["logical_cores"] == 3


def test_what_a_mac_is() -> None:
    files = {
        "uname -sr": "Darwin 23.4.0\n",
        "uname -m": "arm64\n",
        "sysctl -n machdep.cpu.brand_string": "Apple M2\n",
        "sysctl -n hw.memsize": "17179869184\n",
        "sysctl -n hw.physicalcpu": "8\n",
        "sysctl -n hw.logicalcpu": "8\n",
        "sw_vers -productVersion": "14.4\n",
    }
    facts = facts_of(files)
    assert (facts["cpu"], facts["os"], facts["threads"]) == ("Apple M2", "macOS 14.4", 8)
    assert facts["memory_bytes"] == 1 << 34


def test_a_device_that_tells_nothing() -> None:
    facts = facts_of({})
    assert (facts["cpu"], facts["os"], facts["threads"]) == ("unknown", "unknown", 1)


@needs_sh
@needs_proc
@pytest.mark.parametrize("sh", [("sh",), ("busybox", "sh")], ids=lambda sh: sh[0])
def test_this_machine_by_a_shell_is_the_same_machine(tmp_path: Path, sh: tuple[str, ...]) -> None:
    if shutil.which(sh[0]) is None:
        pytest.skip(f"{sh[0]} is not installed")
    found = Readings(Shell(LocalShell(tmp_path, sh))).facts()
    here = machine.facts()
    assert found["fingerprint"] == here["fingerprint"]
    assert found["os"] == here["os"]
    assert found["threads"] == machine.threads()


@needs_sh
@needs_proc
def test_our_own_work_there_is_not_others(tmp_path: Path) -> None:
    readings = Readings(Shell(LocalShell(tmp_path)))
    watch = readings.listen()
    readings.count(os.getpid())
    mine = os.times()
    assert readings.ours == pytest.approx((mine.user + mine.system) * 100, rel=0.1, abs=20)
    readings.ours = 1e9  # more than all that was spent
    load = watch.stop()
    assert load.before is not None
    assert load.during == 0
    readings.count(2**22 + 1)  # no such process
    assert readings.ours == 1e9


def test_ticks_of_a_process_with_a_strange_name() -> None:
    assert ticks_of("7 (a) b) R 1 1 1 0 -1 0 0 0 0 0 30 12 0 0") == 42
    assert ticks_of("") == 0


@needs_sh
def test_what_a_login_shell_prints_is_not_the_answer(tmp_path: Path) -> None:
    class Greeting(LocalShell):
        def words(self, script: str) -> list[str]:
            return super().words(f"printf 'Welcome!\\nno line end'; {script}; echo bye")

    said = Shell(Greeting(tmp_path)).run("echo out; echo err >&2; exit 7", "trying")
    assert (said.code, said.out, said.err) == (7, "out\n", "err\n")


@needs_sh
def test_a_device_that_ends_midway_is_lost(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="trying: lost"):
        Shell(LocalShell(tmp_path)).run("echo half; kill -9 $$", "trying")
    with pytest.raises(DeviceError, match=r"trying: lost \(no answer came in time"):
        Shell(LocalShell(tmp_path)).run("sleep 60", "trying", 0.2)


@needs_sh
@pytest.mark.parametrize("end", ["", "0", "x\\n"])
def test_a_connection_that_is_cut_right_before_the_exit_code(tmp_path: Path, end: str) -> None:
    class Cut(LocalShell):
        def words(self, script: str) -> list[str]:
            return super().words(f"printf '\\n{BEGIN}\\nhalf\\n{END} {end}'")

    with pytest.raises(DeviceError, match="trying: lost"):
        Shell(Cut(tmp_path)).run("true", "trying")


def test_a_device_that_does_not_tell_its_memory_has_no_ceilings(tmp_path: Path) -> None:
    """What is read of a few megabytes is a cache's."""
    shell = Shell(LocalShell(tmp_path, ("no-such-shell",)))  # nothing is started
    place = DevicePlace(shell, Readings(shell), facts_of({}), {}, "runner", "model")
    assert place.ceilings(1) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder, says="Sure")
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


@needs_sh
@needs_proc
def test_a_runner_there_that_is_killed_is_told_from_a_device_that_is_lost(
    tmp_path: Path, model: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shell = LocalShell(home)
    with (
        device(shell, model, stand_in(tmp_path), False, Silent()) as place,
        place.open(model, threads=1, context_tokens=256) as runs,
    ):
        assert runs.facts["threads"] == 1
        with pytest.raises(RuntimeFailure, match="do not fit into the context"):
            runs.generate([5] * 900, 1, frozenset())
    assert place.readings.ours > 0
    assert list(home.iterdir()) == []
    (tmp_path / "dies").write_text(
        "#!/bin/sh\n[ -z $1 ] || { echo '{}'; exit; }\nread a; kill -9 $$"
    )
    with (
        device(shell, model, tmp_path / "dies", False, Silent()) as place,
        pytest.raises(RuntimeFailure, match="too little memory") as died,
    ):
        place.open(model, threads=1, context_tokens=256)
    assert "test://here: " in str(died.value)
    assert list(home.iterdir()) == []


@needs_sh
@needs_proc
def test_what_fails_before_all_is_there_is_not_kept(tmp_path: Path, model: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "runner").write_text("#!/bin/sh\nexit 3")
    with (
        pytest.raises(DeviceError, match="does not run there"),
        device(LocalShell(tmp_path / "home"), model, tmp_path / "runner", True, Silent()),
    ):
        pass
    assert list((tmp_path / "home").iterdir()) == []


@needs_sh
@needs_proc
def test_a_device_that_is_lost_while_it_measures(tmp_path: Path, model: Path) -> None:
    (tmp_path / "home").mkdir()
    shell = LocalShell(tmp_path / "home")
    with device(shell, model, stand_in(tmp_path), False, Silent()) as place:
        runs = place.open(model, threads=1, context_tokens=256)
        shell.sh = ("false",)
        runs._child._process.kill()  # type: ignore[attr-defined]
        with pytest.raises(DeviceError, match="while the runner was asked to tokenize") as lost:
            runs.tokenize("a")
    assert "what this sitting has measured is lost" in str(lost.value)


class Vanishing(Silent):
    """Pulls the cable while the last of a sitting's work is told."""

    def __init__(self, shell: LocalShell, steps: int) -> None:
        self.shell, self.steps = shell, steps

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return VanishingTask(self) if label == "measuring" else SilentTask()


class VanishingTask(SilentTask):
    def __init__(self, cable: Vanishing) -> None:
        self.cable = cable

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.cable.steps -= 1
        if self.cable.steps == 0:
            self.cable.shell.sh = ("false",)


@needs_sh
@needs_proc
def test_a_device_that_is_lost_behind_its_measuring(tmp_path: Path, model: Path) -> None:
    """Two processes, of which each loads the model once, and once for its rates."""
    (tmp_path / "home").mkdir()
    shell, asked = LocalShell(tmp_path / "home"), asked_model(model, None, None, None)
    plan = Plan(processes=2, runs=1, threads=1)
    with device(shell, model, stand_in(tmp_path), False, Silent()) as place:
        found = sit(asked, plan, Vanishing(shell, 2), place)
    assert found.figures["tg128"].value > 0
    assert (found.load["during"], found.conditions["after"], found.roofline) == (None, None, None)
    assert found.load["busy"] is not False  # true where the machine was busy before
    assert found.conditions["before"] is not None
    assert found.conditions["throttled"] is None
    assert any("was gone when all was measured" in note for note in found.notes)
    write_result(found, tmp_path / "r.json")
    assert read_result(tmp_path / "r.json").conditions["after"] is None
    shell.sh = ("sh",)
    with (
        device(shell, model, stand_in(tmp_path), False, Silent()) as place,
        pytest.raises(DeviceError, match="lost"),
    ):
        sit(asked, plan, Vanishing(shell, 1), place)


def test_an_onnx_model_is_measured_here_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="measured on this machine alone"),
        place_at(Address("ssh", "pi"), tmp_path, None, False, Silent()),
    ):
        pass


def test_only_devices_that_are_known_are_emulated(tmp_path: Path) -> None:
    at = Address("emulated", "phon")
    with pytest.raises(UsageError) as refused, place_at(at, tmp_path / "x", None, False, Silent()):
        pass
    assert "did you mean phone?" in str(refused.value)
