"""The side-by-side scripts of this folder as a list, and one of them run for benchmarks/run.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.errors import UsageError, did_you_mean

HERE = Path(__file__).resolve().parent
LAST_LINES = 8
ALL = "}..."
Inputs = dict[str, tuple[str, ...]]  # by name, all that were given of it
NEEDED = re.compile(r"\{([A-Z0-9_]+)\}")
INPUTS = {  # what a script may be given: what it is
    "MODEL": "a GGUF file, such as the model of a bundle in dist/",
    "ONNX_MODEL": "a folder of an ONNX model",
    "SITTINGS": "a folder for result files",
    "OLD_F16": "the GGUF file of a finished export-* folder",
    "NEW_F16": "that of another training of the same student",
    "OLD_BUNDLE": "a folder of dist/",
    "NEW_BUNDLE": "a newer one of the same recipe and target",
    "STUDENT": "a finished student-* folder of the workspace",
    "CHECKPOINT": "a finished merge-* folder of the workspace",
    "DATASET": "a finished curate-* folder of the workspace",
    "HELD_OUT": "held_out.jsonl in that folder",
    "RECIPE": "a recipe's folder",
    "TARGET": "a target's file",
    "SYSTEM": "the student's system prompt",
    "TEXT": "any UTF-8 text, such as a book",
    "LLAMA_BENCH": "the program llama-bench of llama.cpp",
    "LLAMA_IMATRIX": "the program llama-imatrix of llama.cpp",
    "BENCHMARK_E2E": "benchmark/python/benchmark_e2e.py of an onnxruntime-genai checkout",
    "BANKING77": "a folder with banking77's prompts as JSONL",
    "JUDGE": "a GGUF file of the model that judges",
    "CONVERTER": "convert_hf_to_gguf.py of a llama.cpp checkout",
}
PROGRAMS = {"LLAMA_BENCH": "llama-bench", "LLAMA_IMATRIX": "llama-imatrix"}
STAGES = {"STUDENT": "student", "CHECKPOINT": "merge", "DATASET": "curate"}


@dataclass(frozen=True)
class Script:
    """`arguments` name their inputs in braces, `{INPUT}...` all that were given of it; `modules`
    must be importable. A `slow` one takes hours, and runs only when it is named."""

    name: str
    arguments: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    slow: bool = False

    @property
    def needs(self) -> list[str]:
        """The inputs, by name."""
        return [name for word in self.arguments for name in NEEDED.findall(word)]


SCRIPTS = (
    Script("cli_start"),
    Script("planted_regression"),
    Script("decode_rate", ("{MODEL}",)),
    Script("llama_bench", ("{LLAMA_BENCH}", "{MODEL}...")),
    Script("genai_benchmark", ("{BENCHMARK_E2E}", "{ONNX_MODEL}..."), ("pandas", "tqdm")),
    Script("repeatability", ("{MODEL}", "--keep", "{SITTINGS}"), slow=True),
    Script("export_memory", ("{STUDENT}", "{CONVERTER}"), ("sentencepiece",)),
    Script("imatrix_against_llama_cpp", ("{LLAMA_IMATRIX}", "{CHECKPOINT}", "{TEXT}")),
    Script("update_sizes", ("{OLD_F16}", "{NEW_F16}")),
    Script("adapter_update", ("{OLD_BUNDLE}", "{NEW_BUNDLE}", "{HELD_OUT}")),
    Script("aarch64_agreement", ("{MODEL}", "--held-out", "{HELD_OUT}"), slow=True),
    Script("bytes_and_fidelity", ("{RECIPE}", "{TARGET}", "--text", "{TEXT}"), slow=True),
    Script(
        "training_throughput", ("{STUDENT}", "{DATASET}", "--system", "{SYSTEM}"),
        ("trl", "datasets"), slow=True,
    ),
    Script("methods_table", ("{RECIPE}",), slow=True),
    Script("judge_agreement", ("{JUDGE}", "--banking77", "{BANKING77}"), slow=True),
    Script(
        "evaluate_chain", ("{CHECKPOINT}", "{HELD_OUT}", "{BANKING77}", "--system", "{SYSTEM}"),
        ("lm_eval",), slow=True,
    ),
)  # fmt: skip
# Beside these: what makes a peer's files for them, or is imported by them.
NO_MEASUREMENT = ("banking77_recipe", "peer_autoround", "gpu_time")


def read_inputs(given: Sequence[str]) -> Inputs:
    """NAME=VALUE words, of one name as many as there are.

    Raises:
        UsageError: a word is no such pair, or has a name that no script asks for.
    """
    found: Inputs = {}
    for word in given:
        name, separator, value = word.partition("=")
        if not separator or not value:
            raise UsageError(f"--input {word!r} is no NAME=VALUE")
        if name not in INPUTS:
            listed = f"the inputs are {', '.join(INPUTS)}"
            raise UsageError(
                f"--input {name!r} is no input", hint=did_you_mean(name, INPUTS) or listed
            )
        found[name] = (*found.get(name, ()), value)
    return found


def at_hand(workspace: Path) -> Inputs:
    """What is found without being named: programs on the PATH, and the newest finished stages."""
    found = {name: shutil.which(program) for name, program in PROGRAMS.items()}
    for name, stage in STAGES.items():
        found[name] = _newest(each.parent for each in workspace.glob(f"{stage}-*/manifest.json"))
    found["MODEL"] = _newest(Path("dist").glob("*/*.gguf"))
    if found["DATASET"] is not None:
        found["HELD_OUT"] = str(Path(found["DATASET"]) / "held_out.jsonl")
    return {name: (value,) for name, value in found.items() if value is not None}


def _newest(paths: Iterable[Path]) -> str | None:
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else str(newest)


def skipped(script: Script, inputs: Mapping[str, Sequence[str]], named: bool) -> str | None:
    """Why a script is not run, or None."""
    missing = [f"{name} ({INPUTS[name]})" for name in script.needs if name not in inputs]
    if missing:
        return f"needs --input {', '.join(missing)}"
    if lacking := [name for name in script.modules if importlib.util.find_spec(name) is None]:
        return f"needs the package {', '.join(lacking)}"
    if script.slow and not named:
        return f"takes hours: name it with --only {script.name}"
    return None


def _words(word: str, inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """An argument with its inputs in it: the first that was given, or of `{INPUT}...` each."""
    if word.endswith(ALL):
        (name,) = NEEDED.findall(word)
        return list(inputs[name])
    return [word.format_map({name: values[0] for name, values in inputs.items()})]


def run_script(script: Script, inputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Its JSON, or its last lines where it failed; what it tells of its work is shown."""
    words = [each for word in script.arguments for each in _words(word, inputs)]
    begun = time.monotonic()
    # A file: its standard error is the user's to see while it runs.
    done = subprocess.run(
        [sys.executable, str(HERE / f"{script.name}.py"), *words], stdout=subprocess.PIPE,
        text=True, encoding="utf-8", errors="replace",
        env={**os.environ, **machine.child_environment(), "PYTHONSAFEPATH": ""},
    )  # fmt: skip
    found: dict[str, Any] = {"name": script.name, "arguments": words}
    found["seconds"] = round(time.monotonic() - begun, 1)
    try:
        if done.returncode == 0:
            return {**found, "result": json.loads(done.stdout)}
        why = f"exit code {done.returncode}"
    except ValueError as error:
        why = f"what it printed is no JSON: {error}"
    last = done.stdout.splitlines()[-LAST_LINES:]
    return {**found, "failed": "; ".join([why, *last])}
