"""Make `.venv` with everything edgedistill needs, pinned by constraints.txt; do nothing when it is
up to date. Standard library only, the same on Linux, macOS and Windows:

    python scripts/setup_env.py
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "edgedistill.stamp"
LLAMA_STAMP = VENV / "llama.stamp"
CONSTRAINTS = ROOT / "constraints.txt"
LLAMA_BUILD = ROOT / "cmake" / "llama-build.cmake"
AMX = LLAMA_BUILD.with_name("amx_tile_config.h")
SHAPING = (ROOT / "pyproject.toml", CONSTRAINTS, LLAMA_BUILD, AMX, Path(__file__))
EXTRAS = "build,dev"


def main() -> int:
    if sys.version_info < (3, 11):
        print(f"edgedistill needs Python 3.11 or newer; this is {sys.version.split()[0]}")
        return 1
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text("utf-8") == wanted and python().is_file():
        print(f"environment: up to date ({VENV.name})")
        return 0
    started = time.monotonic()
    for label, work in STEPS:
        print(f"environment: {label} ...", flush=True)
        begun = time.monotonic()
        try:
            work()
        except subprocess.CalledProcessError as error:
            print(f"environment: failed: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
            print("  what is installed stays; running this again goes on", file=sys.stderr)
            return 1
        print(f"environment: {label}: {time.monotonic() - begun:.0f} s", flush=True)
    STAMP.write_text(wanted, "utf-8")
    print(f"environment: ready after {time.monotonic() - started:.0f} s")
    return 0


def fingerprint() -> str:
    """Changes with anything that decides what is installed."""
    sha = hashlib.sha256(f"{sys.version}\0{ROOT}".encode())
    for path in SHAPING:
        sha.update(path.read_bytes())
    sha.update(own_flags().encode())  # nothing, where there are none
    return sha.hexdigest()


def own_flags() -> str:
    """The caller's, by which llama.cpp is compiled."""
    return os.environ.get("CMAKE_ARGS", "").strip()


def python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create() -> None:
    # A venv cannot be moved, and half of one cannot be repaired: start over unless it runs.
    works = python().is_file() and _runs(python())
    if not works:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)


def _runs(interpreter: Path) -> bool:
    command = [str(interpreter), "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def install(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [str(python()), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run(
        [*command, "-c", str(CONSTRAINTS), *arguments],
        check=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


def install_llama() -> None:
    # Without the parts that nothing here calls it builds in half the time. A caller's own flags
    # (-DGGML_CUDA=on) come last and win.
    ours = shlex.quote(f"-DCMAKE_PROJECT_INCLUDE={LLAMA_BUILD.as_posix()}")
    flags = f"-DLLAVA_BUILD=OFF {ours} {own_flags()}".strip()
    environment, wanted = {"CMAKE_ARGS": flags}, compiled_from(flags)
    if not LLAMA_STAMP.is_file() or LLAMA_STAMP.read_text("utf-8") != wanted:
        # Neither pip's cache of wheels nor what is installed knows by which flags it was compiled.
        fresh = ("--force-reinstall", "--no-deps", "--no-cache-dir")
        install(*fresh, "llama-cpp-python", environment=environment)
        LLAMA_STAMP.write_text(wanted, "utf-8")
    install("llama-cpp-python[server]", environment=environment)


def compiled_from(flags: str) -> str:
    """Changes with anything that decides what llama.cpp's library is."""
    pins = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "llama" in line]
    parts = [flags, *pins, *(file.read_text("utf-8") for file in (LLAMA_BUILD, AMX))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


STEPS: tuple[tuple[str, Callable[[], None]], ...] = (
    ("create .venv", create),
    ("upgrade pip", lambda: install("--upgrade", "pip")),
    ("install torch", lambda: install("torch")),
    ("compile llama.cpp (minutes)", install_llama),
    (f"install edgedistill[{EXTRAS}]", lambda: install("-e", f".[{EXTRAS}]")),
)

if __name__ == "__main__":
    sys.exit(main())
