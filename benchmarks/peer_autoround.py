"""A peer for bytes_and_fidelity.py: AutoRound's GGUF of a merged student, in its own environment.

    python benchmarks/peer_autoround.py CHECKPOINT DATASET OUT --system SQL [--format gguf:q4_0]

CHECKPOINT is the folder of a merge stage, DATASET of a curate stage: AutoRound (arXiv 2309.05516)
tunes its rounding on the training prompts with the teacher's answers, as edgedistill does. Needs
`pip install auto-round gguf sentencepiece` where this runs, and nothing of edgedistill. (0.16.1
knows architectures that gguf 0.19 has not: for a Qwen student name a llama.cpp checkout in
LLAMA_CPP_ROOT, or have its converter look those MODEL_ARCH up by getattr, as for the figures of
docs/few-bytes.md.)
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", required=True, help="the student's system prompt")
    parser.add_argument("--format", default="gguf:q4_0")
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's default")
    parser.add_argument("--length", type=int, default=64, help="tokens of one sample")
    given = parser.parse_args()

    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    begun = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=given.format.upper(),
        iters=given.iterations,
        seqlen=given.length,
        nsamples=128,
        batch_size=8,
        dataset=_batches(tokenizer, given),
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(given.out), format=given.format)
    print(json.dumps({"seconds": round(time.perf_counter() - begun, 1)}))


def _batches(tokenizer: Any, given: Any) -> list[Any]:
    """Training rows one behind the other, cut to samples of `length` tokens."""
    import torch

    ids: list[int] = []
    for line in (given.dataset / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        messages = [
            {"role": "system", "content": given.system},
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) // given.length
    samples = torch.tensor(ids[: count * given.length]).view(count, given.length)
    return [{"input_ids": part} for part in samples.split(8)]


if __name__ == "__main__":
    main()
