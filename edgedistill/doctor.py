"""What this machine can do, and what to install for what is missing.

torch and transformers are never imported here (their versions come from package metadata), and
llama.cpp is loaded in a child process: a library built for another CPU kills what loads it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from edgedistill import emulator, machine, weights
from edgedistill.browser import BROWSER_VARIABLE, find_browser
from edgedistill.converter import VARIABLE, is_checkout
from edgedistill.weights import FOLDERS_VARIABLE

State = Literal["ok", "missing", "note"]
LOAD_SECONDS = 60
# Enough for one small build: two models, a checkpoint and its exports.
DISK_BYTES = 8_000_000_000
MEMORY_BYTES = 4_000_000_000
LOAD = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
# Package -> the extra that installs it.
PACKAGES: Mapping[str, str] = {
    "openai": "collect",
    "uvicorn": "local-teacher",
    "fastapi": "local-teacher",
    "torch": "distill",
    "transformers": "distill",
    "peft": "distill",
    "accelerate": "distill",
    "safetensors": "distill",
    "tokenizers": "distill",
    "gguf": "distill",
    "matplotlib": "report",
    "onnxruntime-genai": "onnx",
    "onnx-ir": "onnx",
}
# Variable -> whether what it names can be used.
SETTINGS: Mapping[str, Callable[[str], bool]] = {
    FOLDERS_VARIABLE: lambda folder: Path(folder).expanduser().is_dir(),
    BROWSER_VARIABLE: lambda program: shutil.which(program) is not None,
    VARIABLE: lambda folder: is_checkout(Path(folder)),
}
COMPILER_HINTS: Mapping[str, str] = {
    "Linux": "install a C++ compiler (Debian, Ubuntu: apt install build-essential)",
    "Darwin": "run: xcode-select --install",
    "Windows": "install the Visual Studio Build Tools with C++",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `hint` says what to do when `state` is not "ok"."""

    area: str
    name: str
    state: State
    value: str
    hint: str = ""


def examine(workspace: Path, packages: Mapping[str, str] = PACKAGES) -> list[Finding]:
    """All findings, in the order in which they are shown. Reads only; may take some seconds."""
    return [
        *_machine(machine.facts(), workspace),
        *_runtimes(LOAD),
        *_packages(packages),
        *settings(os.environ),
        *_tools(),
        *_weights(weights.KNOWN),
    ]


def _machine(facts: Mapping[str, Any], workspace: Path) -> Iterator[Finding]:
    cores = f"{facts['physical_cores']} physical, {facts['usable_cores']} usable"
    yield Finding("machine", "system", "ok", f"{facts['os']} {facts['architecture']}")
    yield Finding("machine", "processor", "ok", facts["cpu"])
    yield Finding("machine", "cores", "ok", cores)
    features = " ".join(facts["cpu_features"])
    yield Finding("machine", "cpu features", "ok" if features else "note", features or "unknown")
    yield _room("memory", psutil.virtual_memory().available, facts["memory_bytes"], MEMORY_BYTES)
    disk = shutil.disk_usage(existing(workspace))
    yield _room("disk", disk.free, disk.total, DISK_BYTES)
    gpus = ", ".join(facts["gpus"])
    yield Finding(
        "machine", "gpu", "ok" if gpus else "note", gpus or "none found; the CPU does the work"
    )


def existing(path: Path) -> Path:
    """The nearest folder of a path that is there."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _room(name: str, free: int, total: int, wanted: int) -> Finding:
    value = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    if free >= wanted:
        return Finding("machine", name, "ok", value)
    hint = f"a build of the default recipe wants about {wanted / 1e9:.0f} GB free"
    return Finding("machine", name, "note", value, hint)


def _runtimes(code: str) -> Iterator[Finding]:
    installed = _version("llama-cpp-python")
    if installed is None:
        hint = 'in the checkout: pip install -e ".[local-teacher]"'
        yield Finding("runtime", "llama-cpp-python", "missing", "not installed", hint)
    else:
        yield loads(installed, code)
    path = shutil.which("ollama")
    yield Finding(
        "runtime", "ollama", "ok" if path else "note", path or "not found (only to run bundles)"
    )


def loads(version: str, code: str) -> Finding:
    """Run `code`, which loads the native library, in a child; its death becomes a finding."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=LOAD_SECONDS,
            env=machine.child_environment(),
        )
    except subprocess.TimeoutExpired:
        why = f"still loading after {LOAD_SECONDS} s"
    else:
        if done.returncode == 0:
            return Finding("runtime", "llama-cpp-python", "ok", f"{version}, loads")
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        why = f"exit code {done.returncode}: {said[0]}"
    hint = "build it again for this machine: pip install --force-reinstall --no-cache-dir "
    hint += "--no-binary llama-cpp-python llama-cpp-python"
    return Finding("runtime", "llama-cpp-python", "missing", f"{version}, but {why}", hint)


def _packages(wanted: Mapping[str, str]) -> Iterator[Finding]:
    for name, extra in wanted.items():
        version = _version(name)
        if version is None:
            hint = f'in the checkout: pip install -e ".[{extra}]"'
            yield Finding("package", name, "missing", "not installed", hint)
        else:
            yield Finding("package", name, "ok", version)


def settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is set for us, and whether it leads anywhere: a misspelt path costs a download."""
    for name, leads in SETTINGS.items():
        if (given := environment.get(name)) is None:
            continue
        parts = given.split(os.pathsep) if name == FOLDERS_VARIABLE else [given]
        lost = [part for part in parts if part and not leads(part)]
        hint = f"nothing that can be used is at {', '.join(lost)}: mend {name}, or unset it"
        yield Finding("setting", name, "note" if lost else "ok", given, hint if lost else "")


def _tools() -> Iterator[Finding]:
    compiler = _first_of("c++", "g++", "clang++", "cl")
    hint = COMPILER_HINTS.get(platform.system(), "install a C++ compiler")
    yield _tool("compiler", compiler, f"needed to build llama-cpp-python: {hint}")
    hint = "only to measure a target that runs in a browser: install Chromium, Chrome or Edge"
    yield _tool("browser", find_browser(), hint)
    yield _tool("cmake", _first_of("cmake"), "only to build by hand; pip brings its own")
    yield _emulation()


def _emulation() -> Finding:
    problem = emulator.emulator_problem()
    if problem is None:
        return Finding("tool", "aarch64 emulation", "ok", "QEMU and a cross compiler")
    hint = "phones and boards: without it, fidelity on their kernels is not measured"
    return Finding("tool", "aarch64 emulation", "note", problem, hint)


def _tool(name: str, path: str | None, hint: str) -> Finding:
    # Both are needed only to build a runtime, so their absence is a note where one is installed.
    if path:
        return Finding("tool", name, "ok", path)
    return Finding("tool", name, "note", "not found", hint)


def _weights(known: Iterable[str]) -> Iterator[Finding]:
    for name in known:
        path = weights.cached(name)
        size = weights.KNOWN[name].bytes / 1e6
        if path is None:
            value = f"not here yet ({size:.0f} MB)"
            yield Finding("weights", name, "note", value, "fetched when a build needs it")
        else:
            yield Finding("weights", name, "ok", str(path))


def _first_of(*programs: str) -> str | None:
    return next((path for path in map(shutil.which, programs) if path), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
