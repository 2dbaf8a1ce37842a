"""Our importance matrix beside llama.cpp's own llama-imatrix: the same student, text and chunks.

    python benchmarks/imatrix_against_llama_cpp.py LLAMA_IMATRIX CHECKPOINT TEXT
        [--chunks 4] [--context 512]

CHECKPOINT is a finished `student-*` or `merge-*` folder of a workspace, TEXT any UTF-8 text. Both
read the same tokens, llama.cpp from an F32 GGUF with an F32 cache, ours in torch. Prints JSON: of
all matrices the largest difference of a column's mean square, as a share of that matrix's largest,
and which matrices only one of the two has (we also weigh an embedding that is the head).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import machine
from edgedistill.activations import measure_importance
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.importance import Importance, read_importance
from edgedistill.progress import Silent
from edgedistill.runtime import LlamaCpp
from edgedistill.student import TOKENIZER_GGUF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path, help="llama.cpp's llama-imatrix")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.gguf"
        origin = Provenance("benchmark", "benchmark", "unknown", "benchmark")
        tokenizer = given.checkpoint / TOKENIZER_GGUF
        write_gguf(given.checkpoint, tokenizer, model, origin, Silent(), encoding="F32")
        theirs = _theirs(given, model)
        ours = measure_importance(given.checkpoint, _tokens(given, model), "benchmark")
    print(json.dumps({"machine": machine.facts(), **_compared(ours, theirs)}, indent=2))


def _theirs(given: argparse.Namespace, model: Path) -> Importance:
    made = model.with_name("theirs.gguf")
    words = [str(given.program.resolve()), "-m", str(model), "-f", str(given.text), "-o", str(made)]
    words += ["-c", str(given.context), "--chunks", str(given.chunks), "--no-ppl", "-fa", "off"]
    words += ["-ctk", "f32", "-ctv", "f32", "--process-output", "-t", str(machine.threads())]
    subprocess.run(words, check=True, capture_output=True)
    return read_importance(made)


def _tokens(given: argparse.Namespace, model: Path) -> list[list[int]]:
    """The chunks as llama-imatrix cuts them: one behind the other, each from an empty context, its
    first token replaced by a BOS where the file asks for one."""
    with LlamaCpp(model, threads=1) as runtime:
        ids = runtime.tokenize(given.text.read_text("utf-8"))
        bos = [runtime.facts["bos"]] if runtime.facts["add_bos"] else []
    ids, width = [*bos, *ids], given.context
    chunks = [ids[at : at + width] for at in range(0, given.chunks * width, width)]
    return [[*bos, *chunk[len(bos) :]] for chunk in chunks if len(chunk) == width]


def _compared(ours: Importance, theirs: Importance) -> dict[str, Any]:
    both = sorted(ours.sums.keys() & theirs.sums.keys())
    worst = {}
    for name in both:
        mine, other = (np.asarray(each.mean(name), np.float64) for each in (ours, theirs))
        worst[name] = float(np.abs(mine - other).max() / other.max())
    return {
        "matrices": len(both),
        "tokens": [max(each.counts.values()) for each in (ours, theirs)],
        "only_ours": sorted(ours.sums.keys() - theirs.sums.keys()),
        "only_llama_cpp": sorted(theirs.sums.keys() - ours.sums.keys()),
        "largest_difference": max(worst.values()),
        "median_difference": float(np.median(list(worst.values()))),
        "worst": sorted(worst, key=lambda name: -worst[name])[:5],
    }


if __name__ == "__main__":
    main()
