from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgedistill.activations import measure_importance
from edgedistill.errors import DatasetError
from edgedistill.importance import Importance
from edgedistill.torch_runtime import load_model

TEXTS = ([5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_student(tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Importance:
    return measure_importance(folder, TEXTS, "three texts")


def by_hand(folder: Path) -> dict[str, Any]:
    """Inputs of a few matrices, recomputed from the model's own parts, a text at a time."""
    model = load_model(folder)
    first = model.model.layers[0]
    sums = dict.fromkeys(("attn_q", "ffn_up", "ffn_down", "head"), 0.0)
    for ids in TEXTS:
        with torch.inference_mode():
            given = model.model.embed_tokens(torch.tensor([ids]))
            states = model.model(torch.tensor([ids]), output_hidden_states=True)
            angles = model.model.rotary_emb(given, torch.arange(len(ids))[None])
            inside = first.input_layernorm(given)
            mask = torch.full((1, 1, len(ids), len(ids)), -torch.inf).triu(1)
            attended, _ = first.self_attn(inside, angles, mask)
            up = first.post_attention_layernorm(given + attended)
            down = torch.nn.functional.silu(first.mlp.gate_proj(up)) * first.mlp.up_proj(up)
        inputs = {"attn_q": inside, "ffn_up": up, "ffn_down": down}
        for name, values in {**inputs, "head": states.last_hidden_state}.items():
            sums[name] = sums[name] + values[0].double().square().sum(0).numpy()
    return sums


def test_sums_are_those_computed_by_hand(folder: Path, found: Importance) -> None:
    expected = by_hand(folder)
    for name in ("attn_q", "ffn_up", "ffn_down"):
        np.testing.assert_allclose(
            found.sums[f"blk.0.{name}.weight"], expected[name], rtol=2e-5, atol=0
        )
    np.testing.assert_allclose(found.sums["token_embd.weight"], expected["head"], rtol=2e-5, atol=0)


def test_every_matrix_is_there_once(found: Importance) -> None:
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = {f"blk.{i}.{kind}.weight" for i in range(tiny.LAYERS) for kind in kinds}
    assert set(found.sums) == {*blocks, "token_embd.weight"}
    assert found.sums["blk.1.ffn_down.weight"].shape == (tiny.WIDTH,)
    assert found.sums["blk.1.ffn_down.weight"].dtype == np.float32
    same = [found.sums[f"blk.1.attn_{kind}.weight"] for kind in "qkv"]
    assert (same[0] == same[1]).all()
    assert (same[0] == same[2]).all()


def test_padding_does_not_count(folder: Path, found: Importance) -> None:
    """Three texts in one padded batch against one text at a time."""
    alone = [measure_importance(folder, [ids], "one") for ids in TEXTS]
    for name, sums in found.sums.items():
        np.testing.assert_allclose(sums, sum(one.sums[name] for one in alone), rtol=1e-5)
    assert set(found.counts.values()) == {13.0}
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("three texts",), 3, 5)


@pytest.mark.parametrize("texts", [[], [[]]])
def test_no_text(folder: Path, texts: list[list[int]]) -> None:
    with pytest.raises(DatasetError, match="no text to measure"):
        measure_importance(folder, texts, "nothing")
