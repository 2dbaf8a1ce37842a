"""What one recipe needs, told by `doctor --recipe` before anything is fetched or paid for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.doctor import Finding, existing
from edgedistill.errors import EdgedistillError
from edgedistill.progress import Silent
from edgedistill.recipe import ApiTeacher, Recipe
from edgedistill.sizes import known_dimensions
from edgedistill.tokenmix import read_token_mix
from edgedistill.training.data import PART_TOKENS
from edgedistill.training.need import Dimensions, dimensions_of, free_memory, needed_bytes
from edgedistill.weights import folder_or_hub
from edgedistill.weights.hub import fetch_model, hub_model

AREA = "recipe"
# Of one parameter: the student and the merged model in fp32, an export in f16, checkpoints.
DISK_BYTES_A_PARAMETER = 4 + 4 + 2 + 1
FP32_BYTES = 4
MEMORY_OF_GPU = re.compile(r"(\d+) MiB")


class _Seen(Exception):
    """The config is there; the weights are not wanted."""


def needs(recipe: Recipe, workspace: Path) -> list[Finding]:
    """Teacher, student, proxy, GPUs, memory, disk and packages of a recipe. Of a hub model that is
    not here yet, config.json is fetched, and nothing else."""
    models = [*_student(recipe, workspace), *_proxy(recipe, workspace)]
    return [*_teacher(recipe), *models, *_packages(recipe)]


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
    if recipe.distill.method == "on-policy" and recipe.distill.on_policy.feedback != "check":
        told += f", and {recipe.distill.on_policy.max_calls} for feedback"
    yield Finding(AREA, "teacher", "ok", told)


def _student(recipe: Recipe, workspace: Path) -> Iterator[Finding]:
    try:
        found = _dimensions(recipe.student.weights)
    except EdgedistillError as error:
        yield Finding(AREA, "student", "missing", error.what, error.hint or "")
        yield from _places(recipe)
        return
    if found is None:
        told = "its size is known once its weights are here"
        yield Finding(AREA, "student", "note", recipe.student.weights, told)
        yield from _places(recipe)
        return
    value = f"{recipe.student.weights}, {found.parameters / 1e9:.2f} billion parameters"
    yield Finding(AREA, "student", "ok", value)
    yield from _processors(recipe, found)
    yield _disk(found, workspace)


def _proxy(recipe: Recipe, workspace: Path) -> Iterator[Finding]:
    spec = recipe.distill
    if spec.proxy is None or spec.begins_with != "proxy":
        return
    try:
        found = _dimensions(spec.proxy.weights)
    except EdgedistillError as error:
        yield Finding(AREA, "proxy", "missing", error.what, error.hint or "")
        return
    if found is None:
        told = "its size is known once its weights are here"
        yield Finding(AREA, "proxy", "note", spec.proxy.weights, told)
        return
    size = f"{spec.proxy.weights}, {found.parameters / 1e9:.2f} billion parameters"
    yield Finding(AREA, "proxy", "ok", size)
    free, need = shutil.disk_usage(existing(workspace)).free, FP32_BYTES * found.parameters
    hint = "" if free >= need else "free some space, or give --workspace on another disk"
    told = f"{need / 1e9:.1f} GB more of {free / 1e9:.1f} GB free, and as much memory to load it"
    yield Finding(AREA, "proxy's disk", "ok" if free >= need else "missing", told, hint)


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


def _processors(recipe: Recipe, found: Dimensions) -> Iterator[Finding]:
    yield from _places(recipe)
    spec, gpus = recipe.distill, machine.gpu_names()
    kind = "cuda" if gpus else "cpu"
    precise = "bf16" if spec.precision == "auto" and gpus else spec.precision
    settled = spec.model_copy(update={"precision": "fp32" if precise == "auto" else precise})
    most = needed_bytes(found, settled, PART_TOKENS[kind], False)
    least = needed_bytes(found, settled, max(spec.max_length, 128), True)
    free = _gpu_bytes(gpus) if gpus else free_memory()
    told = f"{least / 1e9:.1f} GB at least, {most / 1e9:.1f} GB to train fastest"
    if free is not None:
        told += f"; {free / 1e9:.1f} GB {'on each GPU' if gpus else 'free'}"
    short = free is not None and free < least
    hint = "a smaller student, or distill.tuning qlora on a GPU" if short else ""
    yield Finding(AREA, "training memory", "missing" if short else "ok", told, hint)


def _gpu_bytes(names: list[str]) -> int | None:
    found = [int(size[1]) << 20 for name in names if (size := MEMORY_OF_GPU.search(name))]
    return min(found, default=None)


def _disk(found: Dimensions, workspace: Path) -> Finding:
    need = DISK_BYTES_A_PARAMETER * found.parameters
    free = shutil.disk_usage(existing(workspace)).free
    told = f"about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
    hint = "" if free >= need else "free some space, or give --workspace on another disk"
    return Finding(AREA, "disk", "ok" if free >= need else "missing", told, hint)


def _packages(recipe: Recipe) -> Iterator[Finding]:
    wanted: list[str] = [*recipe.distill.report_to]
    wanted += ["bitsandbytes"] if recipe.distill.tuning == "qlora" else []
    for name in wanted:
        there = importlib.util.find_spec(name) is not None
        hint = "" if there else f"pip install {name}"
        value = "installed" if there else "not installed"
        yield Finding(AREA, f"package {name}", "ok" if there else "missing", value, hint)


def _dimensions(name: str) -> Dimensions | None:
    """Of a student's weights; None where only having them would tell."""
    place = hub_model(name) if folder_or_hub(name) is not None else None
    if place is None or place.complete:
        return known_dimensions(name)
    found: dict[str, Any] = {}

    def accept(config: Path) -> None:
        found.update(json.loads(config.read_text("utf-8")))
        raise _Seen

    with contextlib.suppress(_Seen):
        fetch_model(place, Silent(), accept)
    return dimensions_of(found)
