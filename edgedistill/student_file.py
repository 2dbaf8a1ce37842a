"""What is wrong with a student before any work: of a GGUF file its header tells, of a folder or a
fetched hub model its JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.converter import HINT, checkout
from edgedistill.errors import ArtifactError, EdgedistillError, WeightsError
from edgedistill.families import ARCHITECTURES, gemma_layer_types, known_names
from edgedistill.gguf_header import read_header
from edgedistill.hf_config import require_student
from edgedistill.recipe import PruneSpec, StudentSpec
from edgedistill.sizes import known_dimensions
from edgedistill.weights import KNOWN, HubModel, folder_or_hub


@dataclass(frozen=True)
class Wrong:
    """What is wrong with which field of `student`."""

    field: str
    what: str


@dataclass(frozen=True)
class Layers:
    """How many there are (None: not known here), and whether they are of one kind."""

    count: int | None
    alike: bool


def student_problem(spec: StudentSpec) -> Wrong | None:
    """The first thing that `prepare_student` or `prune` would refuse, as far as it can be seen
    without fetching, reading weights or cutting text; None where that is nothing."""
    try:
        layers = _layers(spec.weights, "student")
    except (ArtifactError, WeightsError) as error:
        return Wrong("weights", _told(error, error.hint))
    if spec.prune is None or layers is None:
        return None
    what = prune_problem(spec.prune, layers)
    return Wrong("prune", what) if what else None


def prune_problem(prune: PruneSpec, layers: Layers) -> str:
    """Why so many layers cannot be dropped; "" where they can."""
    if not layers.alike:
        return "layers of this architecture are of several kinds in a fixed order; leave it out"
    if layers.count is not None and prune.drop_layers >= layers.count:
        return f"drop_layers is {prune.drop_layers}, and the model has {layers.count} layers"
    return ""


def proxy_problem(weights: str) -> str:
    """The same of a proxy's weights, in words about it; "" where there is nothing."""
    try:
        _layers(weights, "proxy")
    except (ArtifactError, WeightsError) as error:
        return _told(error, hint_for("proxy", error))
    return ""


def hint_for(role: str, error: EdgedistillError) -> str | None:
    """What to do about a model that cannot be a student, where it was to be a proxy."""
    about_student = error.hint is not None and "another student" in error.hint
    return "choose another proxy" if role == "proxy" and about_student else error.hint


def _told(error: EdgedistillError, hint: str | None) -> str:
    told = f"{error.where}: {error.what}" if error.where else error.what
    return f"{told}; {hint}" if hint else told


def _layers(weights: str, role: str) -> Layers | None:
    """The layers of a student or proxy that was looked at; None: it is not on this machine."""
    if weights.lower().endswith(".gguf"):
        return _of_file(Path(weights))
    place = folder_or_hub(weights)
    if place is None:
        return _of_pinned(weights, role)
    folder = place.folder if isinstance(place, HubModel) else place
    if isinstance(place, HubModel) and not place.complete:
        return None
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}")
    return layers_of(require_student(folder).model)


def layers_of(config: Mapping[str, Any]) -> Layers:
    """The layers that a config.json tells of."""
    kinds = {*(config.get("layer_types") or ())}
    if str(config.get("model_type")).startswith("gemma3"):
        kinds |= {*gemma_layer_types(config.get("num_hidden_layers") or 0)}
    return Layers(config.get("num_hidden_layers"), len(kinds) < 2)


def _of_file(file: Path) -> Layers:
    if not file.is_file():
        raise WeightsError(f"there is no file {file}")
    header = read_header(file)
    _require_known(header.architecture)
    if not header.keys.get("tokenizer.chat_template"):
        raise WeightsError(
            "it has no chat template, so nobody knows how to prompt it",
            where=str(file),
            hint="use an instruction-tuned model",
        )
    count = header.keys.get(f"{header.architecture}.block_count")
    alike = header.architecture != "gemma3" or len({*gemma_layer_types(count or 0)}) < 2
    return Layers(count, alike)


def _of_pinned(name: str, role: str) -> Layers:
    pin = KNOWN.get(name)
    known = ", ".join(name for name, pin in KNOWN.items() if pin.trainable)
    if pin is None:
        raise WeightsError(
            f"no pinned weights '{name}'; known: {known}; or give the path of a GGUF "
            "file, a folder as ./name, or a hub model as org/name@revision"
        )
    if not pin.trainable:
        raise WeightsError(f"'{name}' cannot be a {role} yet; those that can: {known}")
    _require_known(pin.architecture)
    found = known_dimensions(name)
    return Layers(found.layers if found else None, pin.architecture != "gemma3")


def _require_known(architecture: str) -> None:
    if architecture not in ARCHITECTURES and checkout() is None:
        raise WeightsError(
            f"architecture {architecture!r} cannot be trained, only {known_names()}",
            hint=f"choose another student; or {HINT}",
        )
