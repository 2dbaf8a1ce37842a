"""One of several processes that train together; started by together.py through torchrun.

It ends when its stdin closes, whatever it is doing: then the build that wants its work is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from edgedistill.artifacts import RESUME, write_json
from edgedistill.distill.lesson import Job, course_of
from edgedistill.distill.together import RESULT
from edgedistill.errors import Diverged, EdgedistillError
from edgedistill.progress import Silent, SilentTask, Task


def main(job_file: str, folder: str) -> None:
    """Train the job in `folder`, and leave the result for the parent."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = Job.model_validate_json(Path(job_file).read_text("utf-8"))
    try:
        _train(job, Path(folder))
    except EdgedistillError as error:
        told = {"what": error.what, "where": error.where, "hint": error.hint}
        tell({"error": told | {"diverged": isinstance(error, Diverged)}})
        sys.exit(1)


def _train(job: Job, folder: Path) -> None:
    import torch.distributed as dist

    from edgedistill.torch_runtime import device
    from edgedistill.training.history import as_json
    from edgedistill.training.processes import is_first, join
    from edgedistill.training.trainer import train

    join(device().type)
    done = train(course_of(job, folder), folder, Telling() if is_first() else Silent())
    if is_first():
        resume = folder / RESUME
        kept = done.kept.relative_to(resume).as_posix()
        value = {"kept": kept, "points": as_json(done.points), "facts": done.facts}
        write_json(resume / RESULT, value)
    dist.barrier()
    dist.destroy_process_group()


def _leave_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock an ending interpreter wants
        pass
    os._exit(1)


def tell(value: Any) -> None:
    """One line for the parent."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Telling(Silent):
    """Tells the parent how far the training is."""

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        tell({"steps": total})
        return _Told()


class _Told(SilentTask):
    def advance(self, amount: float = 1, shown: str = "") -> None:
        tell({"advance": amount, "shown": shown})


if __name__ == "__main__":
    main(*sys.argv[1:])
