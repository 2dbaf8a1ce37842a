"""What one stage hands to the next: frozen, paths and facts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TokenMixEntry:
    """One prompt that a user really sent. `messages` always holds at least one user message."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    reference: str | None = None

    @property
    def prompt(self) -> str:
        """The last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


@dataclass(frozen=True)
class Traces:
    """The answers of one recipe's token mix: `traces.jsonl`, one trace a prompt, in prompt order.

    `digest` covers prompts and answers, not latencies: the same answers give the same digest.
    """

    folder: Path
    digest: str
    file: Path
    answered: int
    failed: int


@dataclass(frozen=True)
class Dataset:
    """Curated rows: `train.jsonl`, `validation.jsonl`, `held_out.jsonl`, `rejected.jsonl`."""

    folder: Path
    digest: str
    train: int
    validation: int
    held_out: int
    rejected: int


@dataclass(frozen=True)
class Student:
    """The base student: a Hugging Face checkpoint folder in fp32 (safetensors), `tokenizer.json`,
    and `tokenizer.gguf.json` with every `tokenizer.*` key of its GGUF files. `layers`: numbers, in
    the base, of those that a pruned one has left of `layers_before`."""

    folder: Path
    digest: str
    name: str
    licence: str
    source: str
    layers: tuple[int, ...] = ()
    layers_before: int = 0

    @property
    def title(self) -> str:
        """The name, and whether layers are missing: for readers, no name on a model hub."""
        if not self.layers:
            return self.name
        return f"{self.name} pruned to {len(self.layers)} of {self.layers_before} layers"

    @property
    def stem(self) -> str:
        """What file names begin with."""
        if not self.layers:
            return self.name
        return f"{self.name}-{len(self.layers)}of{self.layers_before}-layers"


@dataclass(frozen=True)
class TokenTargets:
    """`targets.safetensors`: which of the student's tokens another model finds likely at each place
    of the training answers (edgedistill/targets.py)."""

    folder: Path
    digest: str
    file: Path


@dataclass(frozen=True)
class Adapter:
    """LoRA weights in peft's layout, and `training.json` (loss and agreement over the steps)."""

    folder: Path
    digest: str
    steps: int


@dataclass(frozen=True)
class Checkpoint:
    """A merged Hugging Face model folder in fp32, safetensors only, with the base's tokenizer."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Sensitivity:
    """`sensitivity.json`: tensor (GGUF name) -> type -> predicted mean KLD, in nats a token; and
    `asked.json`: the prompts and answers, as token IDs, that it was measured on."""

    folder: Path
    digest: str
    file: Path
    asked: Path


@dataclass(frozen=True)
class Allocation:
    """The number format of each matrix: `allocation.json`, tensor (GGUF name) -> type; with
    `importance.gguf` where the search for scales is to weigh columns by it."""

    folder: Path
    digest: str
    types: Mapping[str, str]
    importance: Path | None


@dataclass(frozen=True)
class Exported:
    """A checkpoint in a runtime's own format before quantization: `model` is a GGUF f16 file, or a
    folder with an ONNX fp32 model. `checkpoint` is given where candidates are made from that."""

    folder: Path
    digest: str
    model: Path
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Importance:
    """The mean square of every matrix's inputs over the token mix: `importance.gguf`, in
    llama.cpp's imatrix format."""

    folder: Path
    digest: str
    file: Path


@dataclass(frozen=True)
class Variant:
    """The student prepared for one allocation of a target, before it is quantized.

    `checkpoint` is what `exported` was written from (None for ONNX, which is made of the checkpoint
    itself): `trimmed`, if the allocation asks for that, and then fitted; `kept_tokens` are the IDs
    that its tokens had before, None where it has them all."""

    name: str
    checkpoint: Checkpoint
    trimmed: Checkpoint | None
    allocation: Allocation
    exported: Exported | None
    fitted: bool
    kept_tokens: Sequence[int] | None


@dataclass(frozen=True)
class Quantized:
    """The winning quantized file (for ONNX: folder), its type, and `candidates.json`, the table of
    all. `others` more are inside the bounds of the target and not refused."""

    folder: Path
    digest: str
    model: Path
    format: str
    others: int = 0


@dataclass(frozen=True)
class Report:
    """`report.json`: everything measured about one build; `fidelity.json` holds what does not
    depend on the clock."""

    folder: Path
    digest: str
    file: Path


@dataclass(frozen=True)
class Bundle:
    """What ships."""

    folder: Path
    digest: str
    model: Path
