"""The boundary to llama.cpp. It runs in a child process (runtime_child.py), because a malformed
GGUF makes it abort: its death, refusal or silence becomes a RuntimeFailure (see child.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgedistill import machine
from edgedistill.adapter_file import require_fit
from edgedistill.artifacts import is_full
from edgedistill.child import REQUEST_SECONDS, Child, Program
from edgedistill.errors import RuntimeFailure
from edgedistill.gguf_header import TYPES, read_header
from edgedistill.quantize_request import check_request, check_written

LLAMA_CPP = Program(
    runtime="llama.cpp",
    module="edgedistill.runtime_child",
    packages={"llama_cpp": "llama-cpp-python"},
    extra="runtime",
)
CHILD = LLAMA_CPP.command
QUANTIZE_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class Generation:
    """One greedy answer. `ids` is without the stop token; seconds are without tokenization.
    `token_seconds`: of each decode behind the first token, where the runtime tells."""

    ids: list[int]
    text: str
    stopped: bool
    time_to_first_token: float
    total_seconds: float
    decode_seconds: float
    token_seconds: Sequence[float] = ()

    @property
    def tokens_per_second(self) -> float:
        """Decode rate behind the first token; 0 when nothing was decoded. The stop token counts: it
        costs one decode too."""
        decodes = len(self.ids) - (0 if self.stopped else 1)
        return decodes / self.decode_seconds if decodes > 0 and self.decode_seconds > 0 else 0.0


class LlamaCpp:
    """A GGUF model, loaded in a child process; a context manager. The child also ends with us.
    `adapter`: a LoRA GGUF that is applied at full strength.

    `facts`: n_vocab, n_ctx, description, size (bytes of tensors), parameters, threads,
    load_seconds, bos, eos, add_bos, add_eos, kernels (what llama.cpp was compiled with and takes on
    this processor, as it says it). `command` starts another child that speaks the same requests,
    such as `emulator.Emulator.command`; `child` is one that was started elsewhere, where the model
    is the file `path`.

    Raises (every method):
        RuntimeFailure: llama.cpp refused, died, or gave no answer within `request_seconds`.
        MissingTool: llama-cpp-python is not installed.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        context_tokens: int = 1024,
        request_seconds: float = REQUEST_SECONDS,
        command: Sequence[str] = CHILD,
        adapter: Path | None = None,
        child: Child | None = None,
        path: str | None = None,
    ) -> None:
        if adapter is not None:
            require_fit(adapter, model)
        self._child = child or Child(LLAMA_CPP, model, request_seconds, command)
        try:
            self.facts: Mapping[str, Any] = self._child.ask(
                "load",
                path=path or str(model),
                threads=threads or machine.threads(),
                context_tokens=context_tokens,
                **({} if adapter is None else {"adapter": str(adapter)}),
            )
        except BaseException:
            self.close()
            raise

    def metadata(self) -> dict[str, str]:
        """The GGUF's keys (arrays left out) as llama.cpp prints them."""
        return dict(self._child.ask("metadata"))

    def end_ids(self) -> frozenset[int]:
        """The tokens at which llama.cpp's own programs stop."""
        return frozenset(self._child.ask("end_ids"))

    def tokenize(self, text: str) -> list[int]:
        """Token IDs; special tokens in the text are parsed, no BOS is added."""
        return list(self._child.ask("tokenize", text=text))

    def detokenize(self, ids: list[int]) -> str:
        """Text of token IDs, special tokens included."""
        return str(self._child.ask("detokenize", ids=ids)) if ids else ""

    def generate(
        self,
        ids: list[int],
        max_tokens: int,
        stop_ids: frozenset[int],
        *,
        stop_texts: Sequence[str] = (),
    ) -> Generation:
        """Greedy answer to the prompt `ids`, from an empty cache: argmax of raw logits. It ends at
        the token that completes one of `stop_texts`, which stays in it, as at a stop token."""
        asked = {"stop_texts": list(stop_texts)} if stop_texts else {}
        answer = self._child.ask(
            "generate", ids=ids, max_tokens=max_tokens, stop_ids=sorted(stop_ids), **asked
        )
        return Generation(**answer)

    def logits(self, ids: list[int], first: int, into: Path) -> list[int]:
        """Append float32 rows [len(ids)-first, n_vocab] to the file `into`: row j holds the logits
        that predict `ids[first+j]`. Returns the most likely token of each row."""
        return list(self._child.ask("logits", ids=ids, first=first, into=str(into)))

    def bench(self, pp: int, tg: int, runs: int, depth: int = 0) -> dict[str, list[float]]:
        """Tokens/s of each run after a warm-up, by llama-bench's convention: `pp` for a prompt of
        so many random tokens, `tg` for so many single-token decodes, both from an empty cache or
        behind `depth` tokens."""
        deep = {"depth": depth} if depth else {}
        return dict(self._child.ask("bench", pp=pp, tg=tg, runs=runs, **deep))

    def peak_memory_bytes(self) -> int:
        """Largest resident size of the child so far."""
        return int(self._child.ask("peak_memory_bytes"))

    def close(self) -> None:
        """End the child. Safe to call twice."""
        self._child.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class QuantizedFile:
    """What was written: the type of each tensor, read from the file, and the file's bytes."""

    types: Mapping[str, str]
    bytes: int


def quantize_file(
    source: Path,
    destination: Path,
    format: str,
    threads: int | None = None,
    *,
    importance: Path | None = None,
    types: Mapping[str, str] | None = None,
    pure: bool = False,
    request_seconds: float = QUANTIZE_SECONDS,
) -> QuantizedFile:
    """llama.cpp's quantization of a GGUF f32, f16 or bf16 file; `destination` appears only when
    complete.

    `format` is a mixture such as Q4_K_M; with `pure` every matrix takes its main type. `types`
    names tensors (exactly) that take a type of their own whatever the mixture says, embedding and
    head included. A row that is not whole blocks takes a fallback (gguf_header.type_for);
    `importance` is a GGUF imatrix of this model.

    Raises:
        ArtifactError: the source is damaged or quantized already, or the matrix is another model's.
        RuntimeFailure: an unknown format, type or tensor, or llama.cpp refused, died, or gave no
            answer within `request_seconds`.
        OSError: the disk is full.
    """
    wanted = types or {}
    check_request(source, format, importance, wanted)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    child = Child(LLAMA_CPP, source, request_seconds)
    try:
        child.ask(
            "quantize",
            source=str(source),
            destination=str(temporary),
            format=format,
            threads=threads or machine.threads(),
            importance=None if importance is None else str(importance),
            types={name: TYPES[type][0] for name, type in wanted.items()},
            pure=pure,
        )
        written = read_header(temporary)
        check_written(written, wanted, source)
        made = {tensor.name: tensor.type for tensor in written.tensors}
        size = temporary.stat().st_size
        os.replace(temporary, destination)
    except RuntimeFailure as error:
        # llama.cpp does not say why a write failed.
        if is_full(destination.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination)) from error
        raise
    finally:
        child.close()
        temporary.unlink(missing_ok=True)
    return QuantizedFile(made, size)
