"""Combine: the trained adapter and others of the same student become one adapter.

The sum of low-rank updates is one update whose rank is the sum of theirs: their A lie one below the
other and their B side by side, each B scaled by its own adapter's scale and weight. Nothing is
approximated, and whatever takes one adapter takes this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import (
    Adapter,
    Identity,
    digest_of,
    digest_of_file,
    load_finished,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.errors import ArtifactError
from edgedistill.progress import Progress
from edgedistill.recipe import MergeSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = ".lora_A.weight", ".lora_B.weight"
Floats = npt.NDArray[np.float32]
# What a sum of two low-rank updates cannot say.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, [], ()),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "init_lora_weights": (True, "gaussian", "orthogonal", None),  # others change the base
}


def combine(adapter: Adapter, spec: MergeSpec, out: Path, progress: Progress) -> Adapter:
    """Stage "combine"; the adapter itself where there are no others.

    Raises:
        ArtifactError: an adapter is none that can be added, or is of another student.
    """
    if not spec.adapters:
        return adapter
    parts = [(adapter.folder, 1.0), *((other.path, other.weight) for other in spec.adapters)]
    for folder, _ in parts:
        require_plain(folder)
    others = {
        f"adapter {at}": digest_of(
            [digest_of_file(other.path / name) for name in (WEIGHTS, CONFIG)] + [other.weight]
        )
        for at, other in enumerate(spec.adapters, 1)
    }
    identity = Identity(
        stage="combine",
        version=1,
        spec={},
        inputs={"adapter": adapter.digest, **others},
        tools=tool_versions("safetensors"),
    )

    def work(folder: Path) -> dict[str, Any]:
        from safetensors.numpy import save_file

        read = [(_read(path, weight), path) for path, weight in parts]
        for part, path in read[1:]:
            _require_alike(read[0][0], part, path)
        summed, rank = added([part for part, _ in read])
        save_file(summed, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((adapter.folder / CONFIG).read_text("utf-8"))
        write_json(folder / CONFIG, config | {"r": rank, "lora_alpha": rank, "use_rslora": False})
        (folder / "training.json").write_bytes((adapter.folder / "training.json").read_bytes())
        told = [{"adapter": other.path.name, "weight": other.weight} for other in spec.adapters]
        trained = load_finished(adapter.folder, reused=True)
        facts = {"steps": adapter.steps} if trained is None else trained.facts
        return {**facts, "rank": rank, "added": told}

    done = run_stage(identity, out, progress, work)
    return Adapter(done.folder, done.digest, adapter.steps)


def require_plain(folder: Path) -> None:
    """Refuse a folder that holds no plain LoRA adapter in peft's layout.

    Raises:
        ArtifactError: says why.
    """
    if not folder.is_dir():
        _refuse(folder, "there is no such folder")
    if not (folder / CONFIG).is_file():
        _refuse(folder, f"it holds no adapter in peft's layout: there is no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _refuse(folder, f"it holds no adapter in peft's layout: {CONFIG}: {error!r}")
    if not (folder / WEIGHTS).is_file():
        _refuse(folder, f"there is no {WEIGHTS}")
    for field, allowed in PLAIN.items():
        if config.get(field) not in allowed:
            _refuse(folder, f"{field} is {config[field]!r}, which cannot be added to another")


def _read(folder: Path, weight: float) -> dict[str, Floats]:
    """Its tensors; each B scaled, so that the update is B A."""
    from safetensors.numpy import load_file

    config = json.loads((folder / CONFIG).read_text("utf-8"))
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = weight * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {
        name: values.astype(np.float32) * np.float32(scale if name.endswith(B) else 1.0)
        for name, values in load_file(folder / WEIGHTS).items()
    }


def _require_alike(first: Mapping[str, Floats], other: Mapping[str, Floats], path: Path) -> None:
    """Refuse tensors that the first adapter has not, or of another size: another student's."""
    for name, values in other.items():
        if name not in first:
            _refuse(path, f"{name} is not among what is trained here")
        side = 1 if name.endswith(A) else 0
        if values.shape[side] != first[name].shape[side]:
            _refuse(path, f"{name} has another size than here: it is another student's")


def added(parts: Sequence[Mapping[str, Floats]]) -> tuple[dict[str, Floats], int]:
    """The tensors of the sum, and its rank. A layer that an adapter leaves out gets zeros from
    it."""
    ranks = [
        next(len(values) for name, values in part.items() if name.endswith(A)) for part in parts
    ]
    layers = sorted({name.removesuffix(A) for part in parts for name in part if name.endswith(A)})
    made: dict[str, Floats] = {}
    for layer in layers:
        sizes = {
            (part[layer + A].shape[1], part[layer + B].shape[0])
            for part in parts
            if layer + A in part
        }
        ((columns, rows),) = sizes
        blank = [
            (np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32))
            for rank in ranks
        ]
        halves = [
            (part.get(layer + A, down), part.get(layer + B, up))
            for part, (down, up) in zip(parts, blank, strict=True)
        ]
        made[layer + A] = np.concatenate([down for down, _ in halves], 0)
        made[layer + B] = np.ascontiguousarray(np.concatenate([up for _, up in halves], 1))
    return made, sum(ranks)


def _refuse(where: Path, what: str) -> NoReturn:
    raise ArtifactError(what, where=str(where), hint="mend merge.adapters in the recipe")
