"""Tiny random checkpoints of every family, made by transformers' own classes, with tiny.py's
tokenizer: what llama.cpp computes from their exports is compared with what torch computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors.numpy import save_file

from edgedistill.artifacts import Student
from edgedistill.families import gemma_layer_types
from edgedistill.runtime import LlamaCpp
from edgedistill.student import Key, write_tokenizer
from edgedistill.torch_runtime import TorchModel

WINDOW = 16
# Merges that overlap, that need others first, and with the space in them.
PIECES = (
    *("th", "he", "the", "▁the", "▁t", "in", "ing", "▁a", "an", "▁an", "and", "▁and", "er", "on"),
    *(
        "▁▁",
        "▁▁▁▁",
        "ab",
        "ba",
        "aba",
        "bab",
        "abab",
        "▁s",
        "é",
        "日本",
        "日",
        "本",
        "12",
        "x",
        "y",
    ),
    *("t", "h", "e", "i", "n", "g", "a", "d", "r", "o", "b", "s", "▁", "1", "2"),
)
# A turn ends with a token that is not the end-of-sequence token, as Phi-3's and Gemma's do.
SENTENCEPIECE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|user|>' + message['role'] + '\n'"
    " + message['content'] + '<|end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": tiny.STOP,
    "pad_token_id": tiny.STOP,
}
SMALL = {"hidden_size": 128, "intermediate_size": 256}  # instead, where many are made
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5 + i / 8 for i in range(32)],
    "short_factor": [1.0 + i / 16 for i in range(32)],
    "original_max_position_embeddings": 256,
}
GEMMA = {
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "layer_types": gemma_layer_types(6),
}
# transformers' model type and what its config says beside COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "smollm2": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "mistral with a window": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {"sliding_window": 128}),
    "phi3 long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "phi4 mini": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                **LONGROPE,
                "partial_rotary_factor": 0.75,
                "long_factor": LONGROPE["long_factor"][:24],
                "short_factor": LONGROPE["short_factor"][:24],
            },
            "original_max_position_embeddings": 256,
        },
    ),
}

# Not a family of ours: llama.cpp's converter exports it.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {"olmo2": ("olmo2", {"tie_word_embeddings": False})}


def family_student(
    folder: Path, name: str, seed: int = 0, keys: list[Key] | None = None, **changes: Any
) -> Student:
    """Write the checkpoint of one of FAMILIES or OTHERS: about two million random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = {**FAMILIES, **OTHERS}[name]
    keys = keys or tiny.tokenizer_keys()
    vocabulary = len(next(key.value for key in keys if key.key == "tokenizer.ggml.tokens"))
    settings = {**COMMON, **own, **changes, "vocab_size": vocabulary}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    chance = torch.Generator().manual_seed(seed)
    for at, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=chance)
        if parameter.dim() == 1:
            centre = parameter.data if "norm" in at else 0.0
            parameter.data = centre + 0.2 * values
        else:
            parameter.data = values * (1.1 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder, keys)
    return Student(
        folder, f"student-{name}-{seed}", "example/Tiny-2M-Instruct", "Apache-2.0", "by hand"
    )


def sentencepiece_keys(
    space_prefix: bool,
    pieces: Sequence[str] = PIECES,
    own: Sequence[str] = ("[mark]", "\n\n"),
) -> list[Key]:
    """A SentencePiece vocabulary by hand: special tokens, 256 bytes, characters, `pieces`; the
    later, the rarer."""
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({character for piece in pieces for character in piece} | set("0123.,?!\n"))
    longer = [piece for piece in pieces if len(piece) > 1]
    tokens = [*special, *own, *bytes_, *longer, *characters]
    kinds = [2, *[3] * 5, *[4] * len(own), *[6] * 256, *[1] * (len(longer) + len(characters))]
    scores = [0.0] * (len(special) + len(own) + 256)
    scores += [-float(i) for i in range(len(longer) + len(characters))]
    return [
        Key("tokenizer.ggml.model", "STRING", None, "llama"),
        Key("tokenizer.ggml.pre", "STRING", None, "default"),
        Key("tokenizer.ggml.tokens", "ARRAY", "STRING", tokens),
        Key("tokenizer.ggml.scores", "ARRAY", "FLOAT32", scores),
        Key("tokenizer.ggml.token_type", "ARRAY", "INT32", kinds),
        Key("tokenizer.ggml.bos_token_id", "UINT32", None, 1),
        Key("tokenizer.ggml.eos_token_id", "UINT32", None, 2),
        Key("tokenizer.ggml.unknown_token_id", "UINT32", None, 0),
        Key("tokenizer.ggml.add_bos_token", "BOOL", None, True),
        Key("tokenizer.ggml.add_space_prefix", "BOOL", None, space_prefix),
        Key("tokenizer.chat_template", "STRING", None, SENTENCEPIECE_TEMPLATE),
    ]


@dataclass(frozen=True)
class Fidelity:
    """llama.cpp's distribution against torch's: KL divergence in nats, and by how much the token
    llama.cpp finds most likely is less likely to torch than its own, at most."""

    mean_kld: float
    top1_gap: float


def fidelity(checkpoint: Path, model: Path, folder: Path, tokens: int = 96) -> Fidelity:
    """Both on the same random tokens; `tokens` is beyond a sliding window of WINDOW."""
    ids = random_ids(tokens)
    (wanted,) = TorchModel(checkpoint).logits([(ids, 1)])
    file = folder / "logits.f32"
    with LlamaCpp(model, threads=1, context_tokens=128) as runtime:
        runtime.logits(ids, 1, file)
    found = np.fromfile(file, np.float32).reshape(len(ids) - 1, -1)
    file.unlink()
    likely = _log_softmax(wanted)
    chosen = likely[np.arange(len(likely)), found.argmax(axis=1)]
    return Fidelity(float(kld(wanted, found).mean()), float((likely.max(axis=1) - chosen).max()))


def random_ids(tokens: int) -> list[int]:
    """Tokens of tiny.py's vocabulary, none of them special."""
    return [int(token) for token in np.random.default_rng(5).integers(3, 271, tokens)]


def kld(wanted: Any, found: Any) -> Any:
    """KL divergence of each row of logits [n, vocabulary] to the same row of others, in nats."""
    wanted, found = _log_softmax(wanted), _log_softmax(found)
    return (np.exp(wanted) * (wanted - found)).sum(axis=1)


def _log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def change_tensor(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one tensor of a checkpoint."""
    from safetensors.numpy import load_file

    file = folder / "model.safetensors"
    values = load_file(file)
    values[name] = np.ascontiguousarray(change(values[name]))
    save_file(values, file, metadata={"format": "pt"})
