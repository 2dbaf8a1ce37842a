from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from edgedistill.artifacts import Checkpoint, Dataset
from edgedistill.errors import ArtifactError
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.torch_runtime import TorchModel
from edgedistill.trim import closed, kept_tokens, trim, trim_alike

SPEC = StudentSpec(weights="tiny")
TEXTS = ("How many tickets in month 12?", "the answer", "näïve 🙂 <|im_end|> x")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny.tiny_student(tmp_path_factory.mktemp("student")).folder, "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("dataset"), answers=["the answer", "on"])


def trimmed(
    checkpoint: Checkpoint, dataset: Dataset, out: Path, vocabulary: int | None, drop: int
) -> Checkpoint:
    return trim(checkpoint, dataset, SPEC, vocabulary, drop, out, Silent())


def test_tokens_on_the_way_to_a_token_stay() -> None:
    merges = ["t h", "e r", "th e", "Ġ the", "Ġthe r", "o n"]
    assert closed(["Ġthe"], merges) == {"th", "the", "Ġthe"}


def test_kept_text_is_cut_as_before_and_other_text_into_smaller_pieces(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    made = trimmed(checkpoint, dataset, tmp_path, 2, 0)
    whole, own = (StudentPrompt(each.folder, SPEC) for each in (checkpoint, made))
    assert own.vocab_size < whole.vocab_size
    assert len(own.encode("using us")) > len(whole.encode("using us"))
    kept = kept_tokens(made.folder)
    assert kept is not None
    assert len(kept) == own.vocab_size
    for text in TEXTS:
        assert own.decode(own.encode(text)) == text
    asked = "How many tickets in month 12, the 0th?"
    assert [kept[i] for i in own.prompt_ids(asked)] == whole.prompt_ids(asked)
    assert kept[own.stop_id] == whole.stop_id


def test_predictions_among_kept_tokens_do_not_change(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    made = trimmed(checkpoint, dataset, tmp_path, 2, 0)
    kept = kept_tokens(made.folder)
    assert kept is not None
    assert kept != list(range(len(kept)))
    ids = StudentPrompt(made.folder, SPEC).encode("How many tickets")
    (after,) = TorchModel(made.folder).logits([(ids, 1)])
    (before,) = TorchModel(checkpoint.folder).logits([([kept[i] for i in ids], 1)])
    assert np.array_equal(before[:, kept], after)


def test_the_least_missed_layer_goes(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    """A layer that adds nothing is the one that nobody misses."""
    from safetensors.numpy import load_file, save_file

    idle = tmp_path / "idle"
    idle.mkdir()
    for file in checkpoint.folder.iterdir():
        (idle / file.name).write_bytes(file.read_bytes())
    state = load_file(idle / "model.safetensors")
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.1.{part}.weight"] *= 0
    save_file(state, idle / "model.safetensors", metadata={"format": "pt"})
    made = trimmed(Checkpoint(idle, "idle"), dataset, tmp_path, None, 1)
    assert json.loads((made.folder / "kept-layers.json").read_text()) == [0]
    assert json.loads((made.folder / "config.json").read_text())["num_hidden_layers"] == 1
    asked = [(StudentPrompt(idle, SPEC).encode("How many"), 1)]
    (before,), (after,) = (TorchModel(folder).logits(asked) for folder in (idle, made.folder))
    assert np.allclose(before, after, atol=1e-5)
    assert kept_tokens(made.folder) is None


def test_no_layer_is_left(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="drop_layers is 2, and the model has 2 layers"):
        trimmed(checkpoint, dataset, tmp_path, None, 2)


def test_another_checkpoint_is_trimmed_alike(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    fewer = trimmed(checkpoint, dataset, tmp_path, 2, 0)
    example = trimmed(fewer, dataset, tmp_path, None, 1)
    kept = kept_tokens(example.folder)
    whole = StudentPrompt(checkpoint.folder, SPEC).vocab_size
    assert kept is not None
    assert len(kept) < whole
    other = Checkpoint(tiny.tiny_student(tmp_path / "other", seed=1).folder, "other")
    made = trim_alike(other, example, tmp_path, Silent())
    assert kept_tokens(made.folder) == kept
    shapes = [
        {name: tuple(value.shape) for name, value in load_file(file).items()}
        for file in (each.folder / "model.safetensors" for each in (made, example))
    ]
    assert shapes[0] == shapes[1]
    embedding = load_file(other.folder / "model.safetensors")["model.embed_tokens.weight"]
    own = load_file(made.folder / "model.safetensors")["model.embed_tokens.weight"]
    assert np.array_equal(own, embedding[kept])
