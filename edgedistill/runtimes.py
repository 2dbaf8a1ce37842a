"""What stages ask of a device runtime, whichever it is, and how one is opened."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedistill import onnx_formats
from edgedistill.child import REQUEST_SECONDS
from edgedistill.runtime import CHILD, Generation, LlamaCpp

LLAMA, WLLAMA, ONNX = "llama.cpp", "wllama", "onnxruntime-genai"


class Runtime(Protocol):
    """A loaded model in its child process. What each method means: LlamaCpp in runtime.py."""

    facts: Mapping[str, Any]

    def metadata(self) -> dict[str, str]: ...
    def end_ids(self) -> frozenset[int]: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...
    def generate(
        self,
        ids: list[int],
        max_tokens: int,
        stop_ids: frozenset[int],
        *,
        stop_texts: Sequence[str] = (),
    ) -> Generation: ...
    def logits(self, ids: list[int], first: int, into: Path) -> list[int]: ...
    def bench(self, pp: int, tg: int, runs: int, depth: int = 0) -> dict[str, list[float]]: ...
    def peak_memory_bytes(self) -> int: ...
    def close(self) -> None: ...


def asked_ids(runtime: Runtime, text: str) -> list[int]:
    """The tokens of a rendered prompt as an app hands them to the model: the file's own tokenizer
    cuts it, and a BOS comes in front where the file asks for one and the template wrote none."""
    ids = runtime.tokenize(text)
    bos = runtime.facts["bos"]
    return [bos, *ids] if runtime.facts["add_bos"] and ids[:1] != [bos] else ids


class Opened(Runtime, AbstractContextManager["Opened"], Protocol):
    """A runtime that closes itself at the end of a with block."""


def open_runtime(
    kind: str,
    model: Path,
    *,
    threads: int | None = None,
    context_tokens: int = 1024,
    command: Sequence[str] | None = None,
    request_seconds: float = REQUEST_SECONDS,
) -> Opened:
    """Load `model` (a GGUF file, or an ONNX model folder) in a child process. A wllama target's
    file is opened by llama.cpp: it is the same code. `command` is of llama.cpp only.

    Raises:
        RuntimeFailure: the runtime refuses the model or dies. MissingTool: it is not installed.
    """
    if kind == ONNX:
        from edgedistill.onnx_runtime import OnnxGenai

        assert command is None, "only llama.cpp has another child"
        return OnnxGenai(
            model,
            threads=threads,
            context_tokens=context_tokens,
            request_seconds=request_seconds,
        )
    return LlamaCpp(
        model,
        threads=threads,
        context_tokens=context_tokens,
        request_seconds=request_seconds,
        command=CHILD if command is None else command,
    )


@dataclass(frozen=True)
class Traits:
    """What differs between runtimes for a model: the name of the unquantized format, the packages
    that shape a candidate, and the formula of its memory at run time in words."""

    unquantized: str
    tools: tuple[str, ...]
    memory_formula: str


_GGUF = Traits(
    unquantized="F16",
    tools=("llama-cpp-python",),
    memory_formula=(
        "file + KV cache (2 x layers x KV heads x head size x context x 2 B) + buffers "
        "(min(512, context) x (vocabulary + 2 x width) x 4 B)"
    ),
)
TRAITS: Mapping[str, Traits] = {
    LLAMA: _GGUF,
    WLLAMA: _GGUF,
    ONNX: Traits(
        unquantized=onnx_formats.UNQUANTIZED,
        tools=("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir"),
        memory_formula=(
            "2 x files + KV cache (2 x layers x KV heads x head size x context x 4 B) + buffers "
            "(16 x context x width x 4 B)"
        ),
    ),
}


def size_of(model: Path) -> int:
    """Bytes of a model file, or of all files of a model folder."""
    if model.is_dir():
        return sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    return model.stat().st_size


def copy_model(source: Path, destination: Path) -> None:
    """A copy, not a link: users edit a bundle, and what it came from must not change with it."""
    if source.is_dir():
        shutil.copytree(source, destination)
    else:
        shutil.copyfile(source, destination)
