"""Trim: a checkpoint without the tokens and layers that its token mix hardly needs.

A small student is a third vocabulary. A trimmed tokenizer still writes any text, since all bytes
stay, but rare words take more tokens; text that only uses kept tokens is cut as before.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Identity,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.errors import ArtifactError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.gguf_tokenizer import NORMAL, Key
from edgedistill.layers import (
    CONFIGS,
    KEPT_LAYERS,
    ONE_ID,
    kept_layers,
    require_layers,
    write_cut,
)
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import KEPT_TOKENS, TOKENIZER_GGUF, write_tokenizer

TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
BY_TOKEN = {TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.scores"}


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
        layers = kept_layers(checkpoint.folder, shown, rows, drop_layers, progress)
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
    require_layers(config, drop_layers, folder)


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


def _write(
    source: Path,
    folder: Path,
    keys: Mapping[str, Key],
    tokens: list[int] | None,
    layers: Sequence[int],
) -> None:
    write_cut(source, folder, tokens, layers)
    if tokens is not None:
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
