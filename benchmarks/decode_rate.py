"""The harness's own decode rate against a bare llama.cpp loop over the same tokens.

    python benchmarks/decode_rate.py MODEL.gguf [--tokens 128] [--rounds 10] [--threads N]

The harness (edgedistill.runtime.LlamaCpp) generates greedily; the bare loop then feeds exactly
those tokens to llama_decode one by one and takes the argmax each time, and must find the same
ones. Both run in turn, in processes of their own. Prints JSON: both rates, and their ratio with
its spread over rounds (below 1: the harness is slower).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgedistill import machine

PROMPT = "Write a long story about a lighthouse keeper who collects maps of places nobody visits."


def main() -> None:
    arguments = _arguments()
    if arguments.bare:
        _bare(arguments.model, arguments.threads, arguments.context)
        return
    from edgedistill.runtime import LlamaCpp

    with LlamaCpp(
        arguments.model, threads=arguments.threads, context_tokens=arguments.context
    ) as harness:
        prompt = harness.tokenize(PROMPT)
        made = harness.generate(prompt, arguments.tokens, frozenset())  # also warms up
        request = {"prompt": prompt, "answer": made.ids}
        with _bare_process(arguments) as bare:
            _ask(bare, request)  # warms up
            # Who goes first alternates: a machine that slows down over time favours neither.
            rounds = [_round(harness, bare, request, i % 2) for i in range(arguments.rounds)]
            assert bare.stdin is not None
            bare.stdin.close()
    print(json.dumps(_result(arguments, rounds), indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _bare_process(arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(arguments.model), "--bare"]
    command += ["--threads", str(arguments.threads), "--context", str(arguments.context)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(bare: subprocess.Popen[str], request: dict[str, Any]) -> float:
    """Decode rate of the bare loop, tokens/s."""
    assert bare.stdin is not None
    assert bare.stdout is not None
    print(json.dumps(request), file=bare.stdin, flush=True)
    answer = json.loads(bare.stdout.readline())
    if answer["ids"] != request["answer"]:
        raise SystemExit("the bare loop found other tokens than the harness: not comparable")
    return float(answer["tokens_per_second"])


def _round(
    harness: Any, bare: subprocess.Popen[str], request: dict[str, Any], bare_first: int
) -> tuple[float, float]:
    """Decode rates of harness and bare loop, tokens/s."""
    if bare_first:
        rate = _ask(bare, request)
        return _harness_rate(harness, request), rate
    return _harness_rate(harness, request), _ask(bare, request)


def _harness_rate(harness: Any, request: dict[str, Any]) -> float:
    made = harness.generate(request["prompt"], len(request["answer"]), frozenset())
    if made.ids != request["answer"]:
        raise SystemExit("the harness gave other tokens than before: not comparable")
    # One token comes out of the prefill, so n tokens are n - 1 decodes.
    return float((len(made.ids) - 1) / (made.total_seconds - made.time_to_first_token))


def _bare(model: Path, threads: int, context: int) -> None:
    """The loop as llama.cpp's examples/simple has it: requests on stdin, answers on stdout."""
    import ctypes

    import llama_cpp.llama_cpp as lib
    import numpy as np

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(os.fsencode(model), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = context, threads, threads
    session = lib.llama_init_from_model(loaded, options)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))

    def feed(ids: list[int]) -> int:
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(session, lib.llama_batch_get_one(tokens, len(ids))) != 0:
            raise SystemExit("llama_decode failed")
        row = lib.llama_get_logits_ith(session, -1)
        row = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(row, shape=(size,)).argmax())

    for line in sys.stdin:
        request = json.loads(line)
        lib.llama_memory_clear(lib.llama_get_memory(session), False)
        found = [feed(request["prompt"])]
        started = time.perf_counter()
        found += [feed([token]) for token in request["answer"][:-1]]
        seconds = time.perf_counter() - started
        rate = (len(found) - 1) / seconds
        print(json.dumps({"ids": found, "tokens_per_second": rate}), flush=True)


def _result(arguments: argparse.Namespace, rounds: list[tuple[float, float]]) -> dict[str, Any]:
    ours, bare = zip(*rounds, strict=True)
    ratios = [a / b for a, b in rounds]
    return {
        "model": arguments.model.name,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "rounds": len(rounds),
        "harness_tokens_per_second": _spread(ours),
        "bare_tokens_per_second": _spread(bare),
        "ratio": _spread(ratios),
        "machine": machine.facts(),
    }


def _spread(values: Any) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


if __name__ == "__main__":
    main()
