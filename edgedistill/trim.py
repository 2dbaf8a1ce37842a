"""Trim: a checkpoint without the tokens and layers that its token mix hardly needs.

A small student is a third vocabulary. A trimmed tokenizer still writes any text, since all bytes
stay, but rare words take more tokens; text that only uses kept tokens is cut as before.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Identity,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.errors import ArtifactError
from edgedistill.fidelity import EvalRow, kl_divergence, read_rows, shuffled
from edgedistill.progress import Progress, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import (
    KEPT_TOKENS,
    TOKENIZER_FILES,
    TOKENIZER_GGUF,
    Key,
    write_tokenizer,
)

KEPT_LAYERS = "kept-layers.json"
CONFIGS = ("config.json", "generation_config.json")
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
BY_TOKEN = {TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.scores"}
ONE_ID, NORMAL = "_token_id", 1  # keys that end so hold a token ID; gguf.TokenType.NORMAL
ROWS = 16  # training rows that the influence of layers is measured on
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def trim(
    checkpoint: Checkpoint,
    dataset: Dataset,
    prompt: StudentSpec,
    vocabulary: int | None,
    drop_layers: int,
    out: Path,
    progress: Progress,
) -> Checkpoint:
    """Stage "trim". `vocabulary`: how many of the tokens that were merged first (the most common
    ones) stay, beside those of the training rows; None: all. Validation rows have no say, so that
    they show what new words will meet. `drop_layers`: how
    many go, each time the one whose absence changes predictions least.

    Raises:
        ArtifactError: the tokenizer is not byte-level BPE, or there are not so many layers.
    """
    identity = Identity(
        stage="trim",
        version=2,
        spec={
            "vocabulary": vocabulary,
            "drop_layers": drop_layers,
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={"checkpoint": checkpoint.digest, "dataset": dataset.digest},
        tools=tool_versions("tokenizers", "torch", "transformers"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        shown = StudentPrompt(checkpoint.folder, prompt)
        rows = read_rows(dataset.folder / "train.jsonl")
        keys = _keys(checkpoint.folder)
        tokens = _kept_tokens(keys, shown, rows, vocabulary, checkpoint.folder)
        layers = _kept_layers(checkpoint.folder, shown, rows, drop_layers, progress)
        _write(checkpoint.folder, folder, keys, tokens, layers)
        before = len(keys[TOKENS].value)
        progress.note(
            f"trimmed: {len(tokens or keys[TOKENS].value)} of {before} tokens, "
            f"{len(layers)} layers are left"
        )
        return {"tokens": len(tokens or ()) or before, "layers": len(layers)}

    done = run_stage(identity, out, progress, work)
    return Checkpoint(done.folder, done.digest)


def require_trimmable(folder: Path, vocabulary: int | None, drop_layers: int) -> None:
    """Refuse at the start what `trim` would refuse after the distillation. `folder` is the base
    student's.

    Raises:
        ArtifactError: names what cannot be done.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if vocabulary is not None:
        keys = _keys(folder)
        _require_bpe(keys, folder)
        _named_ids(keys, folder)
        if vocabulary >= (count := len(keys[TOKENS].value)):
            raise ArtifactError(
                f"vocabulary is {vocabulary}, and the model has {count} tokens: nothing is trimmed",
                where=str(folder),
                hint="keep fewer, or leave vocabulary out of the allocation",
            )
    _require_layers(config, drop_layers, folder)
    if drop_layers and len({*(config.get("layer_types") or ())}) > 1:
        raise ArtifactError(
            "layers of this architecture are of several kinds in a fixed order",
            where=str(folder),
            hint="leave drop_layers out of the allocation",
        )


def trim_alike(
    checkpoint: Checkpoint, example: Checkpoint, out: Path, progress: Progress
) -> Checkpoint:
    """Stage "trim": to the tokens and layers that a trimmed checkpoint of the same model kept."""
    identity = Identity(
        stage="trim",
        version=1,
        spec={"alike": True},
        inputs={"checkpoint": checkpoint.digest, "example": example.digest},
        tools=tool_versions("tokenizers"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        keys, tokens = _keys(checkpoint.folder), kept_tokens(example.folder)
        layers = json.loads((example.folder / KEPT_LAYERS).read_text("utf-8"))
        _write(checkpoint.folder, folder, keys, tokens, layers)
        return {"tokens": len(tokens or keys[TOKENS].value), "layers": len(layers)}

    done = run_stage(identity, out, progress, work)
    return Checkpoint(done.folder, done.digest)


def kept_tokens(folder: Path) -> list[int] | None:
    """The token IDs that the tokens of a trimmed checkpoint had before; None: it has them all."""
    file = folder / KEPT_TOKENS
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def _keys(folder: Path) -> dict[str, Key]:
    entries = json.loads((folder / TOKENIZER_GGUF).read_text("utf-8"))
    return {entry["key"]: Key(**entry) for entry in entries}


def _kept_tokens(
    keys: Mapping[str, Key],
    shown: StudentPrompt,
    rows: Sequence[EvalRow],
    count: int | None,
    folder: Path,
) -> list[int] | None:
    if count is None:
        return None
    _require_bpe(keys, folder)
    used = _named_ids(keys, folder)
    for row in rows:
        used |= {*shown.prompt_ids(row.prompt, row.history), *shown.answer_ids(row.answer)}
    tokens, merges = keys[TOKENS].value, keys[MERGES].value
    kinds = keys["tokenizer.ggml.token_type"].value
    common = closed({tokens[i] for i in used}, merges) | _first(merges, count)
    return [
        i
        for i, token in enumerate(tokens)
        if i in used or kinds[i] != NORMAL or len(token) == 1 or token in common
    ]


def _require_bpe(keys: Mapping[str, Key], folder: Path) -> None:
    if keys["tokenizer.ggml.model"].value != "gpt2":
        raise ArtifactError(
            "only a byte-level BPE vocabulary can be trimmed, and this one is "
            f"{keys['tokenizer.ggml.model'].value!r}",
            where=str(folder),
            hint="leave vocabulary out of the allocation",
        )


def _require_layers(config: Mapping[str, Any], drop: int, folder: Path) -> None:
    count = config["num_hidden_layers"]
    if drop >= count:
        raise ArtifactError(
            f"drop_layers is {drop}, and the model has {count} layers",
            where=str(folder),
            hint=f"drop at most {count - 1}",
        )


def _named_ids(keys: Mapping[str, Key], folder: Path) -> set[int]:
    """Token IDs that the tokenizer's keys or the configs name, such as the stop token's."""
    found = [key.value for key in keys.values() if key.key.endswith(ONE_ID)]
    for name in CONFIGS:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text("utf-8"))
            found += [config[key] for key in config if key.endswith(ONE_ID)]
    ids = {i for value in found for i in (value if isinstance(value, list) else [value])} - {None}
    if beyond := sorted(i for i in ids if not 0 <= i < len(keys[TOKENS].value)):
        raise ArtifactError(
            f"the tokenizer names token {beyond[0]}, and has {len(keys[TOKENS].value)} tokens",
            where=str(folder),
            hint="leave vocabulary out of the allocation",
        )
    return ids


def _first(merges: Sequence[str], count: int) -> set[str]:
    """What the first `count` merges make: their parts are bytes or made by earlier ones."""
    return {merge.replace(" ", "") for merge in merges[:count]}


def closed(tokens: Iterable[str], merges: Sequence[str]) -> set[str]:
    """`tokens` and everything that byte-pair encoding makes on its way to them (Sennrich et al.
    2016): without those, text that uses a token would be cut otherwise."""
    ranks = {(a, b): rank for rank, (a, b) in enumerate(m.split(" ") for m in merges)}
    found: set[str] = set()
    for token in tokens:
        pieces = list(token)
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
            found.add(pieces[at])
    return found


def _kept_layers(
    folder: Path, shown: StudentPrompt, rows: Sequence[EvalRow], drop: int, progress: Progress
) -> list[int]:
    """Layers that stay, by number, after `drop` times leaving out the least missed one.

    Missed is the mean KLD of the whole model's predictions from those without the layer.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers = list(range(config["num_hidden_layers"]))
    _require_layers(config, drop, folder)
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


def _write(
    source: Path,
    folder: Path,
    keys: Mapping[str, Key],
    tokens: list[int] | None,
    layers: Sequence[int],
) -> None:
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
        kept[name] = values[tokens] if tokens and name in EMBEDDINGS else values
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(source, folder, tokens, layers)
    if tokens is None:
        for file in (*TOKENIZER_FILES, KEPT_TOKENS):
            if (source / file).is_file():
                (folder / file).write_bytes((source / file).read_bytes())
        return
    write_tokenizer(folder, _trimmed_keys(keys, tokens))
    write_json(folder / KEPT_TOKENS, tokens)


def _trimmed_keys(keys: Mapping[str, Key], tokens: Sequence[int]) -> list[Key]:
    names = keys[TOKENS].value
    place, stays = {old: new for new, old in enumerate(tokens)}, {names[i] for i in tokens}
    made = []
    for key in keys.values():
        value = key.value
        if key.key in BY_TOKEN:
            value = [value[i] for i in tokens]
        elif key.key == MERGES:
            value = [m for m in value if stays.issuperset({*m.split(" "), m.replace(" ", "")})]
        elif key.key.endswith(ONE_ID):
            value = place[value]
        made.append(Key(key.key, key.type, key.element, value))
    return made


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
