"""Our rates of ONNX models beside onnxruntime-genai's own benchmark, on the same files in one run.

    python benchmarks/genai_benchmark.py BENCHMARK_E2E MODEL_FOLDER... [--rounds 5] [--threads N]

BENCHMARK_E2E is benchmark/python/benchmark_e2e.py of a checkout of onnxruntime-genai (with the
files beside it); it needs pandas and tqdm (`--python` names an environment that has them). It
decodes behind its prompt and takes the most likely token each time; ours behind 512 random ones
(tg128@d512). Both get the same threads, which do not spin while they wait. Every round runs each
model in both, who goes first alternating. Prints JSON: tokens/s of both, and ours / theirs as a
median over rounds with its middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from llama_bench import PP, RUNS, TG, Rates, rows_of

from edgedistill import machine
from edgedistill.onnx_runtime import CONFIG, OnnxGenai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    ours = partial(_ours, threads=given.threads)
    theirs = partial(_theirs, given.python, given.program, threads=given.threads)
    rows = rows_of("genai_benchmark", given.models, given.rounds, ours, theirs)
    print(
        json.dumps({"machine": machine.facts(), "threads": given.threads, "rows": rows}, indent=2)
    )


def _ours(model: Path, threads: int) -> Rates:
    with OnnxGenai(model, threads=threads, context_tokens=PP + TG + 1) as loaded:
        prompt = loaded.bench(PP, 0, RUNS)["pp"]
        decode = loaded.bench(0, TG, RUNS, PP)["tg"]
    return {"pp": sum(prompt) / RUNS, "tg": sum(decode) / RUNS}


def _theirs(python: str, program: Path, model: Path, threads: int) -> Rates:
    with tempfile.TemporaryDirectory() as place:
        folder, out = _with_threads(model, Path(place), threads), Path(place) / "out.csv"
        words = [
            Path(python).absolute(),
            program.resolve(),
            "-i",
            folder,
            "-l",
            PP,
            "-g",
            TG,
            "-r",
            RUNS,
            "-w",
            1,
            "-k",
            1,
        ]
        words += ["--use_random_tokens", "--chat_template", "{input}", "-o", out]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=place)
        if done.returncode:
            sys.exit(f"{program}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        (record,) = json.loads(out.with_suffix(".json").read_text("utf-8"))
    told = record["metrics"]
    return {
        "pp": float(told["prompt_processing_throughput_tps"]),
        "tg": float(told["token_generation_throughput_tps"]),
    }


def _with_threads(model: Path, place: Path, threads: int) -> Path:
    """The model with the session options that ours is opened with: their benchmark has no option
    for threads."""
    folder = place / "model"
    folder.mkdir()
    for file in model.iterdir():
        os.symlink(file.resolve(), folder / file.name)
    config = json.loads((model / CONFIG).read_text("utf-8"))
    session = config["model"]["decoder"].setdefault("session_options", {})
    session |= {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0"}
    config["search"]["max_length"] = PP + TG
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    return folder


if __name__ == "__main__":
    main()
