"""Which of the processes that train together this one is; alone it is the first of one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(hours=6)  # the others wait while the first one measures


def started_together() -> bool:
    """Whether a launcher such as torchrun has started more than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device_type: str) -> None:
    """Meet the other processes, as Trainer would; before rows are shared out."""
    from accelerate import PartialState

    alone = device_type == "cpu"
    PartialState(cpu=alone, backend="gloo" if alone else None, timeout=PATIENCE)


def rank() -> int:
    return dist.get_rank() if _together() else 0


def world() -> int:
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    return rank() == 0


def shared(value: Any) -> Any:
    """The first process's value, in each."""
    if not _together():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def wait_for_all() -> None:
    """Until every process is here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return bool(dist.is_available() and dist.is_initialized())
