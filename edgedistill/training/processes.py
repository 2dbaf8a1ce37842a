"""Which of the processes that train together this one is; alone it is the first of one."""

from __future__ import annotations

import os

import torch.distributed as dist


def started_together() -> bool:
    """Whether a launcher such as torchrun has started more than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return dist.get_rank() if _together() else 0


def world() -> int:
    return dist.get_world_size() if _together() else 1


def is_first() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    """Until every process is here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return bool(dist.is_available() and dist.is_initialized())
