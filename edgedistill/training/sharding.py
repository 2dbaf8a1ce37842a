"""Frozen weights in shares: each process holds its part of every layer, and the whole of a layer
only while it computes with it (FSDP: Zhao et al. 2023, arXiv 2304.11277).

What is trained is small beside it and stays whole in each process, in DDP as without shares: so
checkpoints are those of any other run, which one process can go on from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from edgedistill.training.learner import Learner
from edgedistill.training.processes import world


def shard_frozen(learner: Learner, where: torch.device) -> None:
    """Share out what is frozen in the layers, a layer at a time, and move the rest to `where`.

    Embeddings, head and last norm stay whole: the loss reads the head outside of the decoder.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = learner.plain.get_decoder()
    frozen = {p for each in decoder.layers for p in each.parameters() if not p.requires_grad}
    whole = {p for p in learner.parameters() if p not in frozen}
    for parameter in whole:
        parameter.data = parameter.data.to(where)
    mesh = init_device_mesh(where.type, (world(),))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    learner.sharded = True


def held_bytes(model: Any) -> int:
    """Of the parameters that this process has of its own."""
    own = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in own)


def averaging(learner: Learner) -> Any:
    """A sharded learner in DDP, which averages the gradients of what is trained."""
    frozen = [name for name, p in learner.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, frozen)
    return DistributedDataParallel(learner, broadcast_buffers=False)


@contextlib.contextmanager
def whole_layers(model: Any) -> Iterator[None]:
    """Within it every process holds all layers whole, so that one can compute without the others;
    every process enters and leaves it. A model that is not sharded is left as it is."""
    if not getattr(model, "sharded", False):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [each for each in model.modules() if isinstance(each, FSDPModule)]
    for each in sharded:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for each in sharded:
            each.set_reshard_after_forward(True, recurse=False)
            each.reshard()
