"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from edgedistill.termination import INTERRUPTED, TERMINATED, Termination

COMMAND = """
import os, signal, sys, click
from edgedistill.cli import cli, main

@cli.command()
def wait():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleared away", flush=True)

main(["wait", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills at once there")
def test_what_is_begun_is_ended_in_order() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert done.returncode == TERMINATED, done.stderr
    assert done.stdout == "cleared away\n"
    assert "interrupted; what was finished is kept" in done.stderr


def test_afterwards_it_is_as_before() -> None:
    ended = Termination()
    assert signal.getsignal(signal.SIGTERM) == ended._raise
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    ended.stop()
    assert ended.exit_code == TERMINATED
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_nothing_is_caught() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(Termination().exit_code))
    thread.start()
    thread.join()
    assert codes == [INTERRUPTED]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
