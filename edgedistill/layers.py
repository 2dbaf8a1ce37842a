"""A checkpoint folder without some of its layers or tokens, and which layers are missed least."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.artifacts import write_json
from edgedistill.errors import ArtifactError
from edgedistill.fidelity import EvalRow, kl_divergence, shuffled
from edgedistill.progress import Progress, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.student import KEPT_TOKENS, TOKENIZER_FILES

KEPT_LAYERS = "kept-layers.json"
CONFIGS = ("config.json", "generation_config.json")
ONE_ID = "_token_id"  # keys that end so hold a token ID
ROWS = 16  # training rows that the influence of layers is measured on
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def require_layers(config: Mapping[str, Any], drop: int, folder: Path, hint: str = "") -> None:
    """Refuse to drop layers that are not there, or that are of several kinds in a fixed order.

    Raises:
        ArtifactError: names what cannot be done; `hint` says where the wish stands.
    """
    count = config["num_hidden_layers"]
    if drop >= count:
        raise ArtifactError(
            f"drop_layers is {drop}, and the model has {count} layers",
            where=str(folder),
            hint=f"drop at most {count - 1}",
        )
    if drop and len({*(config.get("layer_types") or ())}) > 1:
        raise ArtifactError(
            "layers of this architecture are of several kinds in a fixed order",
            where=str(folder),
            hint=hint or "leave drop_layers out of the allocation",
        )


def kept_layers(
    folder: Path, shown: StudentPrompt, rows: Sequence[EvalRow], drop: int, progress: Progress
) -> list[int]:
    """Layers that stay, by number, after `drop` times leaving out the least missed one.

    Missed is the mean KLD of the whole model's predictions from those without the layer.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers = list(range(config["num_hidden_layers"]))
    require_layers(config, drop, folder)
    if not drop:
        return layers
    chosen = sorted(rows, key=lambda row: shuffled(row.id, 0))[:ROWS]
    asked = [
        (shown.prompt_ids(row.prompt, row.history), shown.answer_ids(row.answer)) for row in chosen
    ]
    tries = sum(len(layers) - i for i in range(drop))
    with progress.task("measure the influence of layers", tries, "layers") as task:
        return _without_least_missed(folder, asked, layers, drop, task)


def _without_least_missed(
    folder: Path,
    asked: Sequence[tuple[list[int], list[int]]],
    layers: list[int],
    drop: int,
    task: Task,
) -> list[int]:
    import torch

    from edgedistill.torch_runtime import TorchModel, load_model

    model = load_model(folder)
    every, runs = list(model.model.layers), [(a + b, len(a)) for a, b in asked]

    def predictions(kept: Sequence[int]) -> list[Any]:
        model.model.layers = torch.nn.ModuleList([every[i] for i in kept])
        model.config.num_hidden_layers = len(kept)
        return list(TorchModel.of(model).logits(runs))

    whole = predictions(layers)
    for _ in range(drop):
        missed = {}
        for layer in layers:
            made = predictions([i for i in layers if i != layer])
            klds = [kl_divergence(p, q) for p, q in zip(whole, made, strict=True)]
            missed[layer] = float(np.concatenate(klds).mean())
            task.advance(1)
        layers = [i for i in layers if i != min(missed, key=missed.__getitem__)]
    return layers


def write_cut(
    source: Path, folder: Path, tokens: Sequence[int] | None, layers: Sequence[int]
) -> None:
    """Write `source` into `folder` with these layers and, where `tokens` is given, these rows of
    its embedding; its tokenizer goes along where all tokens stay."""
    from safetensors.numpy import load_file, save_file

    state = load_file(source / "model.safetensors")
    place = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name, values in state.items():
        found = LAYER.match(name)
        if found and int(found[1]) not in place:
            continue
        if found:
            name = f"model.layers.{place[int(found[1])]}.{name[found.end() :]}"
        kept[name] = values[list(tokens)] if tokens and name in EMBEDDINGS else values
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(source, folder, tokens, layers)
    if tokens is None:
        for file in (*TOKENIZER_FILES, KEPT_TOKENS):
            if (source / file).is_file():
                (folder / file).write_bytes((source / file).read_bytes())


def _write_configs(
    source: Path, folder: Path, tokens: Sequence[int] | None, layers: Sequence[int]
) -> None:
    place = {old: new for new, old in enumerate(tokens)} if tokens else None
    for name in CONFIGS:
        if not (source / name).is_file():
            continue
        config = json.loads((source / name).read_text("utf-8"))
        if place:
            for key in [key for key in config if key.endswith(ONE_ID)]:
                config[key] = _mapped(config[key], place)
        if "num_hidden_layers" in config:
            config["num_hidden_layers"] = len(layers)
            config["vocab_size"] = len(tokens) if tokens else config["vocab_size"]
            if isinstance(config.get("layer_types"), list):
                config["layer_types"] = [config["layer_types"][i] for i in layers]
        write_json(folder / name, config)
    write_json(folder / KEPT_LAYERS, list(layers))


def _mapped(value: Any, place: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [place[each] for each in value]
    return None if value is None else place[value]
