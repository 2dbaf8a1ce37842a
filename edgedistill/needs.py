"""What one recipe needs, told by `doctor --recipe` before anything is fetched or paid for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.doctor import Finding, existing
from edgedistill.errors import EdgedistillError
from edgedistill.hf_config import require_family
from edgedistill.initialise import MODEL_ID, UNTOUCHED
from edgedistill.methods import DistillSpec, LoraSpec, ProxySpec
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, PruneSpec, Recipe
from edgedistill.sizes import known_dimensions, rank_problem
from edgedistill.student_file import Layers, hint_for, layers_of, prune_problem
from edgedistill.tokenmix import read_token_mix
from edgedistill.training.data import PART_TOKENS
from edgedistill.training.need import (
    Dimensions,
    dimensions_of,
    free_memory,
    loading_bytes,
    needed_bytes,
)
from edgedistill.weights import folder_or_hub
from edgedistill.weights.hub import fetch_model, hub_model

AREA = "recipe"
# Of the student: itself and the merged model in fp32, an export in f16, checkpoints. A proxy is
# never merged or exported.
DISK_BYTES_A_PARAMETER = {"student": 4 + 4 + 2 + 1, "proxy": 4}
MEMORY_OF_GPU = re.compile(r"(\d+) MiB")


class _Seen(Exception):
    """The config is there; the weights are not wanted."""


def needs(recipe: Recipe, workspace: Path, area: str = AREA) -> list[Finding]:
    """Teacher, student, proxy, GPUs, memory, disk and packages of a recipe, as rows of `area`. Of a
    hub model that is not here yet, config.json is fetched, and nothing else."""
    spec, base = recipe.distill, recipe.student
    learnt = None if spec.tuning == "full" else spec.lora
    told, student = _model("student", base.weights, learnt, base.prune)
    rows = [*_teacher(recipe), *told, *_processors(recipe, student)]
    sizes = {"student": student}
    if spec.proxy is not None and spec.begins_with == "proxy":
        told, sizes["proxy"] = _model("proxy", spec.proxy.weights, spec.proxy.lora)
        rows += [*told, *_proxy_memory(spec, spec.proxy, sizes["proxy"])]
    rows += [_disk(sizes, workspace), *_packages(recipe)]
    return [replace(each, area=area) for each in rows]


def _teacher(recipe: Recipe) -> Iterator[Finding]:
    teacher = recipe.teacher
    count = len(read_token_mix(recipe.prompts, recipe.sample).entries)
    if isinstance(teacher, ApiTeacher):
        name = teacher.api_key_env
        if name is not None:
            there = bool(os.environ.get(name, "").strip())
            hint = "" if there else f"put the teacher's API key into {name}"
            value = "set" if there else "not set"
            yield Finding(AREA, f"key {name}", "ok" if there else "missing", value, hint)
        told = f"at most {count} calls to {teacher.model} at {teacher.base_url}"
    else:
        told = f"at most {count} calls to {teacher.model} on this machine"
    told += f", about {_timed(recipe, count)} more to time it"
    if recipe.distill.method == "on-policy" and recipe.distill.on_policy.feedback != "check":
        told += f", and at most {recipe.distill.on_policy.max_calls} for feedback"
    if teacher.model == MODEL_ID:
        what, hint = UNTOUCHED
        yield Finding(AREA, "teacher", "missing", f"teacher.model {what}; {told}", hint)
    else:
        yield Finding(AREA, "teacher", "ok", told)


def _timed(recipe: Recipe, prompts: int) -> int:
    """Calls of bench: held-out prompts once more, and one before the clock runs. About, since whole
    phrasings are held out."""
    held_out = max(1, round(recipe.curate.split.held_out * prompts))
    return min(recipe.bench.latency_prompts, held_out) + 1


def _model(
    role: str, weights: str, lora: LoraSpec | None, prune: PruneSpec | None = None
) -> tuple[list[Finding], Dimensions | None]:
    """What is known of a student or proxy, and its size where that is known; `lora` is what of it
    is trained (None: all)."""
    try:
        found, layers = _looked_at(weights)
    except EdgedistillError as error:
        return [Finding(AREA, role, "missing", error.what, hint_for(role, error) or "")], None
    if found is None:
        told = "its size is known once its weights are here"
        return [Finding(AREA, role, "note", weights, told)], None
    value = f"{weights}, {found.parameters / 1e9:.2f} billion parameters"
    rows = [Finding(AREA, role, "ok", value)]
    if lora is not None and (wrong := rank_problem(lora, weights, found)):
        hint = f"set it to at most {found.narrowest}"
        rows.append(Finding(AREA, f"{role}'s rank", "missing", f"lora.rank {wrong}", hint))
    if prune is not None and (wrong := prune_problem(prune, layers)):
        hint = "drop fewer layers, or leave student.prune out"
        rows.append(Finding(AREA, "student.prune", "missing", wrong, hint))
    return rows, found


def _places(recipe: Recipe) -> Iterator[Finding]:
    """Processes and what they run on, whatever the student."""
    spec, gpus = recipe.distill, machine.gpu_names()
    places, what = (len(gpus), "GPUs") if gpus else (machine.threads(), "cores, and no GPU")
    enough = spec.processes <= places
    hint = "" if enough else f"--processes {places} trains in as many as there are"
    told = f"{spec.processes} wanted, {places} {what} here"
    yield Finding(AREA, "processes", "ok" if enough else "missing", told, hint)
    if spec.tuning == "qlora" and not gpus:
        hint = "it saves memory on a GPU; on a CPU distill.tuning lora is faster"
        yield Finding(AREA, "tuning", "note", "qlora without a GPU", hint)


def _processors(recipe: Recipe, found: Dimensions | None) -> Iterator[Finding]:
    yield from _places(recipe)
    if found is None:
        yield _not_known("training memory", "student")
        return
    hint = "a smaller student, or distill.tuning qlora on a GPU"
    yield _training_memory("training memory", found, recipe.distill, hint)


def _proxy_memory(
    spec: DistillSpec, proxy: ProxySpec, found: Dimensions | None
) -> Iterator[Finding]:
    """Of a proxy that learns, or that is only asked."""
    name, hint = "proxy memory", "a smaller proxy, or close other programs"
    if found is None:
        yield _not_known(name, "proxy")
    elif proxy.warm_up_epochs or proxy.rounds:
        taught = spec.model_copy(update={"tuning": proxy.tuning, "lora": proxy.lora})
        yield _training_memory(name, found, taught, hint)
    else:
        need = loading_bytes(found)
        yield _memory(name, need, f"{need / 1e9:.1f} GB to load it", hint)


def _training_memory(name: str, found: Dimensions, spec: DistillSpec, hint: str) -> Finding:
    gpus = machine.gpu_names()
    kind = "cuda" if gpus else "cpu"
    precise = "bf16" if spec.precision == "auto" and gpus else spec.precision
    settled = spec.model_copy(update={"precision": "fp32" if precise == "auto" else precise})
    most = needed_bytes(found, settled, PART_TOKENS[kind], False)
    least = needed_bytes(found, settled, max(spec.max_length, 128), True)
    least = least if gpus else max(least, loading_bytes(found))
    most = max(least, most)
    told = f"{least / 1e9:.1f} GB at least, {most / 1e9:.1f} GB to train fastest"
    return _memory(name, least, told, hint)


def _memory(name: str, need: int, told: str, hint: str) -> Finding:
    """What a model needs, against what each GPU has or, without one, is free."""
    gpus = machine.gpu_names()
    free = _gpu_bytes(gpus) if gpus else free_memory()
    if free is not None:
        told += f"; {free / 1e9:.1f} GB {'on each GPU' if gpus else 'free'}"
    short = free is not None and free < need
    return Finding(AREA, name, "missing" if short else "ok", told, hint if short else "")


def _not_known(name: str, role: str) -> Finding:
    """A row that cannot be worked out, so that nobody takes its absence for a yes."""
    return Finding(AREA, name, "note", "not known yet", f"known with the {role}'s size")


def _gpu_bytes(names: list[str]) -> int | None:
    found = [int(size[1]) << 20 for name in names if (size := MEMORY_OF_GPU.search(name))]
    return min(found, default=None)


def _disk(sizes: Mapping[str, Dimensions | None], workspace: Path) -> Finding:
    """All models together: they share one disk."""
    known = {
        role: DISK_BYTES_A_PARAMETER[role] * size.parameters
        for role, size in sizes.items()
        if size is not None
    }
    unknown = [role for role in sizes if role not in known]
    if not known:
        return _not_known("disk", " and the ".join(unknown))
    need, free = sum(known.values()), shutil.disk_usage(existing(workspace)).free
    told = f"about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
    if len(known) > 1:
        told += f" ({', '.join(f'{role} {part / 1e9:.1f}' for role, part in known.items())})"
    if free < need:
        hint = "free some space, or give --workspace on another disk"
        return Finding(AREA, "disk", "missing", told, hint)
    if unknown:
        hint = f"the {unknown[0]} comes on top, once its size is known"
        return Finding(AREA, "disk", "note", told, hint)
    return Finding(AREA, "disk", "ok", told)


def _packages(recipe: Recipe) -> Iterator[Finding]:
    wanted: list[str] = [*recipe.distill.report_to]
    wanted += ["bitsandbytes"] if recipe.distill.tuning == "qlora" else []
    for name in wanted:
        there = importlib.util.find_spec(name) is not None
        hint = "" if there else f"pip install {name}"
        value = "installed" if there else "not installed"
        yield Finding(AREA, f"package {name}", "ok" if there else "missing", value, hint)


def _looked_at(name: str) -> tuple[Dimensions | None, Layers]:
    """Size and layers of a model; None where only having its weights would tell."""
    place = hub_model(name) if folder_or_hub(name) is not None else None
    if place is None or place.complete:
        known = known_dimensions(name)  # of what kinds its layers are, validate has looked at
        return known, Layers(known.layers if known else None, True)
    found: dict[str, Any] = {}

    def accept(config: Path) -> None:
        found.update(json.loads(config.read_text("utf-8")))
        require_family(found, config)
        raise _Seen

    with contextlib.suppress(_Seen):
        fetch_model(place, Silent(), accept)
    return dimensions_of(found), layers_of(found)
