"""One training run in several processes on this machine, started by torchrun.

Each computes its share of every batch; the first one measures, writes checkpoints and tells how
far it is. What they write is where a run in one process would have it, so either goes on from the
other's checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from edgedistill import machine
from edgedistill.artifacts import RESUME, write_json
from edgedistill.distill.lesson import Job
from edgedistill.errors import Diverged, TrainingError
from edgedistill.progress import Progress, Task
from edgedistill.results import TrainingPoint
from edgedistill.training.course import Trained

JOB, RESULT = "job.json", "trained.json"
WORKER = "edgedistill.distill.worker"
SHOWN_LINES = 8
# Where torchrun's own lines begin, and what it says of the process that failed first.
LAUNCHER = "torch/distributed/elastic/"
FAILED = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


def train_together(job: Job, folder: Path, progress: Progress) -> Trained:
    """See training.trainer.train.

    Raises:
        TrainingError: what a process raises; or it died, and the others were ended.
    """
    resume = folder / RESUME
    resume.mkdir(parents=True, exist_ok=True)
    write_json(resume / JOB, job.model_dump(mode="json"))
    count = job.spec.processes
    require_places(count)
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [*_torchrun(count), str(resume / JOB), str(folder)],
            stdin=subprocess.PIPE,  # its end tells the workers that we are gone
            stdout=subprocess.PIPE,
            stderr=printed,
            env=_environment(count),
        )
        try:
            trouble = _listen(process, job, count, progress)
            if process.wait():
                _refuse(trouble, printed, count)
        finally:
            _stop(process)
    return _result(resume)


def require_places(count: int) -> None:
    """Refuse more processes than there are GPUs, or cores where there are none.

    Raises:
        TrainingError: there are too few.
    """
    import torch

    gpus = torch.cuda.device_count()
    places, what = (gpus, "GPUs") if gpus else (machine.threads(), "cores")
    if count > places:
        raise TrainingError(
            f"distill.processes is {count}, and there are {places} {what} here",
            hint=f"set it to {places} at most, or give --processes",
        )


def _torchrun(count: int) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", f"--nproc-per-node={count}", "-m", WORKER),
    ]


def _environment(count: int) -> dict[str, str]:
    threads = max(1, machine.threads() // count)
    # Wheels for Windows are built without libuv, which torchrun asks for.
    own = {"OMP_NUM_THREADS": str(threads), "USE_LIBUV": "0" if os.name == "nt" else "1"}
    return machine.child_environment() | own


def _listen(
    process: subprocess.Popen[bytes], job: Job, count: int, progress: Progress
) -> Mapping[str, Any] | None:
    """Pass on what the first process tells; the error that one told before it ended."""
    assert process.stdout is not None
    trouble = None
    with contextlib.ExitStack() as stack:
        task: Task | None = None
        for line in process.stdout:
            told = _parsed(line)
            if "steps" in told:
                label = f"{job.label} in {count} processes"
                task = stack.enter_context(progress.task(label, told["steps"], "steps"))
            elif "advance" in told and task is not None:
                task.advance(told["advance"], told["shown"])
            elif "error" in told:
                trouble = trouble or told["error"]
    return trouble


def _parsed(line: bytes) -> Mapping[str, Any]:
    """What a library prints on the way is no message of ours."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _refuse(trouble: Mapping[str, Any] | None, printed: IO[bytes], count: int) -> NoReturn:
    if trouble is not None:
        kind = Diverged if trouble["diverged"] else TrainingError
        raise kind(trouble["what"], where=trouble["where"], hint=trouble["hint"])
    printed.seek(0)
    text = printed.read().decode("utf-8", "replace")
    found = FAILED.search(text)
    who, why = "one", "without a word"
    if found:
        who, code = f"number {int(found[1]) + 1}", int(found[2])
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    said = "".join(f"\n    {line}" for line in _own_lines(text)[-SHOWN_LINES:])
    raise TrainingError(
        f"of {count} training processes {who} ended ({why}), so the others were ended, too"
        + (f"; they said last:{said}" if said else ""),
        hint="run the same command again: it goes on from the last checkpoint",
    )


def _own_lines(text: str) -> list[str]:
    """What the processes printed before torchrun told of their end."""
    lines = text.splitlines()
    end = next((at for at, line in enumerate(lines) if LAUNCHER in line), len(lines))
    return lines[:end]


def _stop(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _result(resume: Path) -> Trained:
    value = json.loads((resume / RESULT).read_text("utf-8"))
    points = [TrainingPoint(**point) for point in value["points"]]
    return Trained(resume / value["kept"], points, value["facts"])
