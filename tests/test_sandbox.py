from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedistill.errors import RuntimeFailure
from edgedistill.sandbox import CHILD, Limits, run_tests

GOOD = "def square(x):\n    import collections, heapq, math, re\n    return x * x\n"
WRONG = "def square(x):\n    return x\n"
TESTS = "def check(f):\n    assert f(3) == 9\ncheck(square)\n"
SHORT = Limits(seconds=2)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux' kernel holds a program")


def test_a_right_program_passes_and_it_is_told_what_held_it() -> None:
    verdict = run_tests(GOOD, TESTS, SHORT)
    assert verdict.passed, verdict.why
    assert "audit" in verdict.held_by


def test_a_program_may_write_a_little_in_its_own_folder() -> None:
    assert run_tests(f"{GOOD}open('mine', 'w').write('x' * 1000)\n", TESTS, SHORT).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (WRONG, "AssertionError"),
        ("def square(x:", "SyntaxError"),
        # What ends before the tests do has not passed them.
        ("import sys; sys.exit(0)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("import os; os._exit(0)", "ended before its tests"),
        # What others should be made of.
        (f"check = lambda f: None\n{WRONG}", "AssertionError"),
        (f"import builtins\nbuiltins.exec = lambda *a: None\n{WRONG}", "AssertionError"),
        (f"import json\njson.dumps = lambda *a: 'null'\n{WRONG}", ""),
        (f"import os\nos.write = os._exit = lambda *a: 1\n{WRONG}", ""),
        (f"import os\nfor n in range(3, 9):\n    try: os.write(n, b'x null\\n')\n"
         f"    except OSError: pass\n{WRONG}", "AssertionError"),
        # What runs away.
        ("while True: pass", "no end within 2 s"),
        ("import time; time.sleep(60)", "no end within 2 s"),
        ("import os\nwhile True: os.fork()", "os.fork"),
        ("import threading\nwhile True: threading.Thread(target=print).start()", ""),
        ("x = bytearray(8 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append('a' * 10**7)", ""),
        ("def square(x): return square(x)", "RecursionError"),
        ("import sys; sys.setrecursionlimit(10**9)\ndef square(x): return square(x)", ""),
        ("open('big', 'w').write('x' * 10**8)", "File too large"),
        ("for n in range(10**6): open(str(n), 'w').write('x')", "may not open"),
        ("import os\nwhile True: os.write(3, b'x' * 10**5)", ""),
        # What does harm.
        ("import os; os.kill(os.getppid(), 9)", "os.kill"),
        ("import os; os.kill(-1, 9)", "os.kill"),
        ("import subprocess; subprocess.run(['ls'])", "subprocess"),
        ("import os; os.system('ls')", "os.system"),
        ("import socket; socket.create_connection(('127.0.0.1', 22))", "socket"),
        ("import ctypes; ctypes.CDLL(None)", "ctypes"),
        ("open('/etc/passwd').read()", "may not open"),
    ],
)  # fmt: skip
@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits of a process")
def test_it_does_not_pass(program: str, why: str) -> None:
    started = time.monotonic()
    verdict = run_tests(program, TESTS, SHORT)
    assert not verdict.passed
    assert why in verdict.why
    assert time.monotonic() - started < 20


def test_what_is_outside_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("as it was", "utf-8")
    for code in (
        f"open({str(tmp_path / 'kept')!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(tmp_path / 'kept')!r})",
        f"import os; os.rename({str(tmp_path / 'kept')!r}, 'mine')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert "may not" in run_tests(code, TESTS, SHORT).why
    assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == ["as it was"]


def test_much_that_is_printed_harms_nobody() -> None:
    assert run_tests(f"print('x' * 10**7)\n{GOOD}", TESTS, SHORT).passed


def test_no_secret_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_KEY", "1234")
    look = "import os\nassert 'MY_SECRET_KEY' not in os.environ\n"
    assert run_tests(look + GOOD, TESTS, SHORT).passed
    parent = f"open('/proc/{os.getpid()}/environ', 'rb').read()"
    assert not run_tests(parent, TESTS, SHORT).passed


@LINUX
@pytest.mark.parametrize(
    "act",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "socket.socket()",
        "open('/etc/passwd').read()",
        "os.listdir('/tmp')",
        "open(OUTSIDE, 'w')",
        "os.remove(__file__)",
    ],
)
def test_the_kernel_alone_refuses_it(act: str, tmp_path: Path) -> None:
    """Without the audit hook, which code can get around."""
    own = tmp_path / "own"
    own.mkdir()
    code = (
        f"import os, socket, sys\nsys.path.insert(0, {str(CHILD.parent)!r})\n"
        f"import sandbox_child as child\nOUTSIDE = {str(tmp_path / 'new')!r}\n"
        "child.watch = lambda *words: lambda *event: None\n"
        "held = child.confine(dict(seconds=9, memory_bytes=1 << 30, file_bytes=999, files=9))\n"
        "if not {'landlock', 'seccomp'} <= set(held): print('without'); sys.exit()\n"
        f"try: {act}\nexcept OSError as error: print('refused', error.errno)\nelse: print('done')\n"
    )
    file = tmp_path / "act.py"
    file.write_text(code, "utf-8")
    command = [sys.executable, "-B", str(file)]
    done = subprocess.run(command, cwd=own, capture_output=True, text=True, check=False)
    if done.stdout == "without\n":
        pytest.skip("this kernel has no Landlock or no seccomp")
    assert done.stdout.startswith("refused"), done.stdout + done.stderr


def test_what_cannot_be_confined_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgedistill.sandbox.CHILD", CHILD.with_name("gone.py"))
    with pytest.raises(RuntimeFailure, match="cannot be confined"):
        run_tests(GOOD, TESTS, SHORT)
