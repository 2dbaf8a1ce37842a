from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.bench.roofline import Load, estimate, load_from, load_of
from edgedistill.errors import RuntimeFailure
from edgedistill.target import Roofline

KEYS = {
    "block_count": 2,
    "embedding_length": 64,
    "attention.head_count": 8,
    "attention.head_count_kv": 4,
}
BLOCK = {"blk.0.attn_q.weight": (100, 1000), "token_embd.weight": (40, 300)}


def test_tied_embedding_is_read_as_the_head() -> None:
    load = load_from(BLOCK, KEYS)
    # KV: 2 blocks x 4 heads x (8 + 8) entries x 2 bytes
    # read for each token, and multiplied with a prompt's last one alone
    assert load == Load(weight_bytes=140, parameters=1000, kv_bytes_per_token=256)


def test_untied_embedding_is_not_read() -> None:
    load = load_from({**BLOCK, "output.weight": (60, 300)}, KEYS)
    assert (load.weight_bytes, load.parameters) == (160, 1000)


def test_of_experts_those_in_use_count() -> None:
    experts = {
        **BLOCK,
        "blk.0.ffn_up_exps.weight": (800, 8000),
        "blk.0.ffn_gate_inp.weight": (8, 8),
    }
    keys = {**KEYS, "expert_count": 8, "expert_used_count": 2}
    load = load_from(experts, keys)
    assert (load.weight_bytes, load.parameters) == (140 + 200 + 8, 1000 + 2000 + 8)


def test_heads_may_differ_by_block_and_have_their_own_width() -> None:
    keys = {**KEYS, "attention.head_count_kv": [4, 1], "attention.key_length": 16}
    # 5 heads x (16 + 8) entries x 2 bytes
    assert load_from(BLOCK, keys).kv_bytes_per_token == 240


def test_estimate_by_hand() -> None:
    load = Load(weight_bytes=90_000_000, parameters=100_000_000, kv_bytes_per_token=100_000)
    roofline = Roofline(bandwidth_gb_s=50, efficiency=0.5, compute_gflops=200)
    sources = {"roofline.bandwidth_gb_s": "a data sheet", "memory_budget_mb": "not this one"}
    guess = estimate(load, roofline, prompt_tokens=80, answer_tokens=40, sources=sources)
    # 90 MB of weights and 100 context tokens of 0.1 MB; 25 GB/s of 100 MB a token
    assert guess.bytes_read_per_token == 100_000_000
    assert guess.tokens_per_second == pytest.approx(250)
    assert guess.prefill_tokens_per_second == pytest.approx(1000)
    assert guess.time_to_first_token == pytest.approx(0.08)
    assert guess.end_to_end_p50 == pytest.approx(0.08 + 39 / 250)
    assert guess.sources == {"roofline.bandwidth_gb_s": "a data sheet"}


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all, but long enough to be read")
    with pytest.raises(RuntimeFailure, match="GGUF"):
        load_of(path)


def test_an_architecture_without_heads(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RuntimeFailure, match="not a GGUF file we can size"):
        load_of(tmp_path / "m.gguf")
