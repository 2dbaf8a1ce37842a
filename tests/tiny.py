"""A tiny random llama student with a hand-made byte-level BPE tokenizer, in the same layout as
`prepare_student` makes: small enough for unit tests, real enough for llama.cpp and transformers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.numpy import save_file

from edgedistill.alignment import Aligned
from edgedistill.artifacts import Dataset, Student, TokenTargets, write_json
from edgedistill.fidelity import read_rows
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.student import Key, write_tokenizer
from edgedistill.targets import TargetsWriter
from edgedistill.training.data import TrainingRow, training_rows

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 256, 2, 4, 2, 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STOP = SPECIAL.index("<|im_end|>")
MERGES = (
    "t h",
    "e r",
    "i n",
    "th e",
    "o n",
    "a n",
    "Ġ a",
    "Ġ the",
    "Ġ c",
    "er s",
    "in g",
    "u s",
    "1 2",
)
NORMAL, CONTROL = 1, 3  # gguf.TokenType
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = ("SELECT count(*) FROM tickets", "the answer is 42", "on and on", "nothing, thanks")


def tiny_student(
    folder: Path,
    seed: int = 0,
    architecture: str = "llama",
    adds_bos: bool = False,
    merges: Sequence[str] = MERGES,
    says: str | None = None,
) -> Student:
    """Write the checkpoint; about 1.6 million random weights. `says`: see `made_to_say`."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = tokenizer_keys(adds_bos, merges)
    write_tokenizer(folder, keys)
    vocabulary = len(next(key.value for key in keys if key.key == "tokenizer.ggml.tokens"))
    write_json(folder / "config.json", config(vocabulary, architecture))
    tensors = weights(vocabulary, seed, biased=architecture == "qwen2")
    if says is not None:
        made_to_say(says, tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return student_in(folder, seed, architecture)


def student_in(folder: Path, seed: int = 0, architecture: str = "llama") -> Student:
    """The one that `tiny_student` wrote there."""
    name = "example/Tiny-2M-Instruct"
    return Student(folder, f"student-{architecture}-{seed}", name, "Apache-2.0", "made by hand")


def tokenizer_keys(adds_bos: bool = False, merges: Sequence[str] = MERGES) -> list[Key]:
    """Special tokens, 256 bytes, and what the merges make. The template writes the first BOS that
    is asked for, as SmolLM2's does, but not one that the tokenizer adds."""
    made = ["".join(merge.split()) for merge in merges]
    tokens = [*SPECIAL, *_bytes_as_text(), *made]
    kinds = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL))
    return [
        Key("tokenizer.ggml.model", "STRING", None, "gpt2"),
        Key("tokenizer.ggml.pre", "STRING", None, "gpt-2"),
        Key("tokenizer.ggml.tokens", "ARRAY", "STRING", tokens),
        Key("tokenizer.ggml.token_type", "ARRAY", "INT32", kinds),
        Key("tokenizer.ggml.merges", "ARRAY", "STRING", list(merges)),
        Key("tokenizer.ggml.bos_token_id", "UINT32", None, 0 if adds_bos else 1),
        Key("tokenizer.ggml.eos_token_id", "UINT32", None, STOP),
        Key("tokenizer.ggml.padding_token_id", "UINT32", None, STOP),
        Key("tokenizer.ggml.add_bos_token", "BOOL", None, adds_bos),
        Key("tokenizer.chat_template", "STRING", None, TEMPLATE),
    ]


def _bytes_as_text() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def config(vocabulary: int, architecture: str = "llama") -> dict[str, Any]:
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]],
        "model_type": architecture,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": STOP,
        "pad_token_id": STOP,
        "dtype": "float32",
    }


def weights(vocabulary: int, seed: int, biased: bool = False) -> dict[str, Any]:
    """Random weights of a size that makes predictions neither flat nor certain."""
    chance = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Any:
        scale = 1.5 / columns**0.5
        return (chance.standard_normal((rows, columns)) * scale).astype(np.float32)

    key_value = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_value, HIDDEN),
        "self_attn.v_proj": (key_value, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
    }
    made = {
        "model.embed_tokens.weight": 2 * matrix(vocabulary, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in shapes.items():
            made[f"{at}.{name}.weight"] = matrix(*shape)
            if biased and name[-6] in "qkv":
                made[f"{at}.{name}.bias"] = matrix(1, shape[0])[0]
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}.{name}.weight"] = 1 + 0.1 * matrix(1, HIDDEN)[0]
    return made


def made_to_say(text: str, tensors: dict[str, Any]) -> None:
    """Weights that say `text`, whose bytes all differ, whatever they are asked: a neuron of the
    first layer for each token adds the next one, a line break begins, and nothing else adds any."""
    embedding, mlp = tensors["model.embed_tokens.weight"], "model.layers.0.mlp"
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][:] = 0
    tokens = [*(len(SPECIAL) + byte for byte in f"\n{text}".encode()), STOP]
    for neuron, (now, following) in enumerate(itertools.pairwise(tokens)):
        direction = embedding[now] / np.linalg.norm(embedding[now])
        tensors[f"{mlp}.gate_proj.weight"][neuron] = direction
        tensors[f"{mlp}.up_proj.weight"][neuron] = direction
        tensors[f"{mlp}.down_proj.weight"][:, neuron] = 0.1 * embedding[following]


def tiny_dataset(folder: Path, rows: int = 4, answers: Sequence[str] = ANSWERS) -> Dataset:
    """A dataset whose parts hold `rows` rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "held_out"):
        lines = []
        for i in range(rows):
            row = {
                "id": f"{part}-{i}",
                "prompt": f"How many tickets in month 12, the {i}th?",
                "answer": answers[i % len(answers)],
                "phrasing": f"p{i}",
                "seen": True,
                "weight": 1.0,
                "tags": [],
                "trace_id": f"t{i}",
                "reference": None,
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"{part}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "rejected.jsonl").write_text("", "utf-8")
    return dataset_in(folder, rows)


def dataset_in(folder: Path, rows: int) -> Dataset:
    """The one that `tiny_dataset` wrote there."""
    return Dataset(folder, f"dataset-{rows}", rows, rows, rows, 0)


def tiny_targets(file: Path, rows: Sequence[TrainingRow], likelihoods: Sequence[float]) -> Path:
    """What another model might predict at the tokens of each row's answer, the first one left
    out."""
    shares, chance = (0.5, 0.3, 0.1), np.random.default_rng(3)
    with TargetsWriter(file, len(shares)) as writer:
        for row, likelihood in zip(rows, likelihoods, strict=True):
            made = Aligned.unknown(len(row.answer), len(shares))
            made.ids[:] = [chance.choice(200, len(shares), replace=False) for _ in row.answer]
            made.logprobs[:] = np.log(shares)
            made.known[1:] = True
            writer.add(row.id, made, likelihood)
    return file


def dataset_targets(dataset: Dataset, student: Student, prompt: StudentSpec) -> TokenTargets:
    """Such targets for a dataset's training rows, beside them."""
    shown = StudentPrompt(student.folder, prompt)
    rows = training_rows(read_rows(dataset.folder / "train.jsonl"), shown, 512)
    file = tiny_targets(dataset.folder / "targets.safetensors", rows, [-1.0] * len(rows))
    return TokenTargets(dataset.folder, "targets", file)


def rewrite_gguf(
    source: Path,
    destination: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Callable[[Any], Any]] | None = None,
) -> Path:
    """Copy a GGUF file with some keys replaced (None: left out) and some tensors changed."""
    reader, changed = GGUFReader(source), keys or {}
    writer = GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = changed.get(name, field.contents())
        if name.startswith("GGUF.") or name == "general.architecture" or value is None:
            continue
        element = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], element)
    for tensor in reader.tensors:
        change = (tensors or {}).get(tensor.name, lambda values: values)
        writer.add_tensor(tensor.name, np.ascontiguousarray(change(np.array(tensor.data))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination
