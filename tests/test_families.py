"""Each family's export behaves as its checkpoint does, and a broken one does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFReader
from tiny_families import FAMILIES, WINDOW, change_tensor, family_student, fidelity
from training_rows import packed_loss, padded, rows_of_lengths

from edgedistill.artifacts import Checkpoint, Exported
from edgedistill.distill.model import trained_model
from edgedistill.errors import ArtifactError, TrainingError
from edgedistill.export import export
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.families import even_context, exact_context
from edgedistill.methods import DistillSpec
from edgedistill.progress import Silent
from edgedistill.student import TOKENIZER_GGUF
from edgedistill.tensors import read_layout
from edgedistill.training.data import require_context

BOUND = 1e-5  # nats; measured: 9e-8 to 8e-6
NEAR_TIE = 0.05  # nats


def exported(checkpoint: Path, file: Path) -> Path:
    made_from = Provenance("r", "example/Tiny", "MIT", "digest")
    write_gguf(checkpoint, checkpoint / TOKENIZER_GGUF, file, made_from, Silent())
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    family_student(tmp_path, name)
    file = exported(tmp_path, tmp_path / "model.gguf")
    found = fidelity(tmp_path, file, tmp_path)
    assert found.mean_kld < BOUND
    assert found.top1_gap < NEAR_TIE


def halves_swapped(values: Any) -> Any:
    return np.concatenate(np.split(values, 2)[::-1])


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("llama", "blk.0.attn_q.weight", "unpermuted"),
        ("mistral", "blk.1.attn_k.weight", "unpermuted"),
        ("gemma3", "blk.2.attn_norm.weight", lambda values: values - 1),
        ("gemma3", "output_norm.weight", lambda values: values - 1),
        ("gemma3", "blk.5.attn_q_norm.weight", lambda values: values - 1),
        ("phi3", "blk.1.ffn_up.weight", halves_swapped),
        ("llama 3", "rope_freqs.weight", np.ones_like),
        ("phi3 long", "rope_factors_short.weight", np.ones_like),
        ("qwen3", "blk.0.attn_k_norm.weight", np.ones_like),
    ],
)
def test_a_broken_tensor_is_seen(
    tmp_path: Path, name: str, tensor: str, change: str | Callable[[Any], Any]
) -> None:
    family_student(tmp_path, name)
    sound = exported(tmp_path, tmp_path / "model.gguf")
    if change == "unpermuted":
        (layout,) = (own for own in read_layout(tmp_path).tensors if own.name == tensor)
        heads = layout.heads
        assert heads is not None

        def change(values: Any) -> Any:
            pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
            return pairs.swapaxes(1, 2).reshape(values.shape)

    broken = tiny.rewrite_gguf(sound, tmp_path / "broken.gguf", tensors={tensor: change})
    assert fidelity(tmp_path, broken, tmp_path).mean_kld > 10 * BOUND


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma3", "gemma3.attention.sliding_window", 4 * WINDOW),
        ("gemma3", "gemma3.rope.freq_base_swa", 1e6),
        ("gemma3", "gemma3.rope.freq_base", 1e4),
        ("phi3 long", "phi3.rope.scaling.attn_factor", 1.0),
    ],
)
def test_a_wrong_key_is_seen(tmp_path: Path, name: str, key: str, value: float) -> None:
    family_student(tmp_path, name)
    sound = exported(tmp_path, tmp_path / "model.gguf")
    assert GGUFReader(sound).fields[key].contents() != value
    broken = tiny.rewrite_gguf(sound, tmp_path / "broken.gguf", keys={key: value})
    assert fidelity(tmp_path, broken, tmp_path).mean_kld > 10 * BOUND


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "one full-attention layer in 6"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"hidden_activation": "silu"}, "activation silu"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn"}}, "RoPE type yarn"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"architectures": ["OlmoForCausalLM"]}, "Gemma 3 .Gemma3ForCausalLM. and Phi-3"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    family_student(tmp_path, name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ArtifactError, match=said):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    ("name", "tokens", "why"),
    [
        ("mistral", 512, None),
        ("mistral with a window", 128, "no sliding window"),
        ("phi3", 128, "no sliding window"),
        ("phi3 long", 256, "rotates short prompts like long ones"),
        ("gemma3", 512, None),
    ],
)
def test_context_is_as_long_as_it_is_exact(
    tmp_path: Path, name: str, tokens: int, why: str | None
) -> None:
    family_student(tmp_path, name)
    layout = read_layout(tmp_path)
    found = exact_context(layout.family, layout.config)
    assert found[0] == tokens
    assert (why is None) == (found[1] is None)
    assert why is None or why in str(found[1])


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_shorter_context_is_said(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "phi3")
    notes = Notes()
    made = export(Checkpoint(student.folder, "c"), student, "sql", tmp_path / "out", notes)
    assert isinstance(made, Exported)
    assert any("128 tokens" in text and "512" in text for text in notes.said)


def test_a_changed_norm_changes_the_export(tmp_path: Path) -> None:
    family_student(tmp_path, "gemma3")
    before = GGUFReader(exported(tmp_path, tmp_path / "a.gguf"))
    change_tensor(tmp_path, "model.norm.weight", lambda values: values + 1)
    after = GGUFReader(exported(tmp_path, tmp_path / "b.gguf"))
    name = "output_norm.weight"
    first, second = (
        next(tensor.data for tensor in reader.tensors if tensor.name == name)
        for reader in (before, after)
    )
    np.testing.assert_allclose(second - first, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3", "phi3"])
def test_every_family_trains_with_its_own_loss(tmp_path: Path, name: str) -> None:
    import torch

    student = family_student(tmp_path, name)
    model = trained_model(student.folder, DistillSpec())
    rows = rows_of_lengths(20, 20)
    loss = packed_loss(model, rows)
    with torch.no_grad():
        wanted = model(**padded(rows)).loss
    torch.testing.assert_close(loss, wanted)
    learning = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert len(learning) == sum(1 for n, _ in model.named_parameters() if "lora_" in n) > 0


def test_rows_are_packed_where_a_longer_one_changes_nothing(tmp_path: Path) -> None:
    """Within a window and beyond it; longrope's first context is the longest row."""
    import torch

    for name, lengths in (("gemma3", (60, 9)), ("mistral with a window", (300, 40))):
        model = trained_model(family_student(tmp_path / name, name).folder, DistillSpec())
        rows = rows_of_lengths(*lengths)
        with torch.no_grad():
            alone = [model(**padded([row])).loss for row in rows]
        torch.testing.assert_close(packed_loss(model, rows), sum(alone) / 2)


def test_a_row_beyond_longropes_first_context_is_refused(tmp_path: Path) -> None:
    student = family_student(tmp_path / "student", "phi3 long")
    config = json.loads((student.folder / "config.json").read_text("utf-8"))
    require_context(rows_of_lengths(256, 20), *even_context(config))
    with pytest.raises(TrainingError, match=r"257 tokens, the student's context 256; .*longrope"):
        require_context(rows_of_lengths(257), *even_context(config))
    with pytest.raises(TrainingError, match="context 128; it knows no position"):
        require_context(rows_of_lengths(129), 128, None)


def test_gemmas_capped_logits_are_trained_on(tmp_path: Path) -> None:
    import torch

    student = family_student(tmp_path, "gemma3", final_logit_softcapping=2.0)
    model = trained_model(student.folder, DistillSpec())
    rows = rows_of_lengths(20)
    torch.testing.assert_close(packed_loss(model, rows), model(**padded(rows)).loss.detach())
    file = exported(tmp_path, tmp_path / "model.gguf")
    assert fidelity(tmp_path, file, tmp_path).mean_kld < BOUND
