"""The boundary to llama.cpp. It runs in a child process (runtime_child.py), because a malformed
GGUF makes it abort: its death, refusal or silence becomes a RuntimeFailure with its last lines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from edgedistill import machine
from edgedistill.adapter_file import require_fit
from edgedistill.artifacts import is_full
from edgedistill.errors import MissingTool, RuntimeFailure
from edgedistill.gguf_header import TYPES, read_header
from edgedistill.quantize_request import check_request, check_written

CHILD = (sys.executable, "-m", "edgedistill.runtime_child")
REQUEST_SECONDS = 600.0  # longest wait for one answer
QUANTIZE_SECONDS = 6 * 3600.0
WAIT_SECONDS = 0.5
LAST_LINES = 8


@dataclass(frozen=True)
class Generation:
    """One greedy answer. `ids` is without the stop token; seconds are without tokenization."""

    ids: list[int]
    text: str
    stopped: bool
    time_to_first_token: float
    total_seconds: float
    decode_seconds: float

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
    load_seconds, bos, eos, add_bos, add_eos. `command` starts another child that speaks the same
    requests, such as `emulator.Emulator.command`.

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
    ) -> None:
        if adapter is not None:
            require_fit(adapter, model)
        self._child = _Child(model, request_seconds, command)
        try:
            self.facts: Mapping[str, Any] = self._child.ask(
                "load",
                path=str(model),
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

    def generate(self, ids: list[int], max_tokens: int, stop_ids: frozenset[int]) -> Generation:
        """Greedy answer to the prompt `ids`, from an empty cache: argmax of raw logits."""
        stop = sorted(stop_ids)
        answer = self._child.ask("generate", ids=ids, max_tokens=max_tokens, stop_ids=stop)
        return Generation(**answer)

    def logits(self, ids: list[int], first: int, into: Path) -> list[int]:
        """Append float32 rows [len(ids)-first, n_vocab] to the file `into`: row j holds the logits
        that predict `ids[first+j]`. Returns the most likely token of each row."""
        return list(self._child.ask("logits", ids=ids, first=first, into=str(into)))

    def bench(self, pp: int, tg: int, runs: int) -> dict[str, list[float]]:
        """Tokens/s of each run after a warm-up, by llama-bench's convention: `pp` for a prompt of
        so many random tokens, `tg` for so many single-token decodes from an empty cache."""
        return dict(self._child.ask("bench", pp=pp, tg=tg, runs=runs))

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
    child = _Child(source, request_seconds)
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


class _Child:
    """The process, its pipes, and what it printed."""

    def __init__(self, model: Path, request_seconds: float, command: Sequence[str] = CHILD) -> None:
        self._model = model
        self._request_seconds = request_seconds
        # A file, not a pipe: nobody has to read it, and it is there when the process has died.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=machine.child_environment(),
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put(b"")

    def ask(self, do: str, **given: Any) -> Any:
        if self._printed.closed:
            raise RuntimeFailure(f"llama.cpp was asked to {do} after it was closed")
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps({"do": do, **given}).encode() + b"\n")
            stream.flush()
            line = self._next_line()
        except (OSError, ValueError):  # it has gone, or another thread has closed us
            line = b""
        except queue.Empty:
            self._process.kill()
            self._fail(f"llama.cpp gave no answer to '{do}' for {self._request_seconds:g} s")
        except BaseException:
            self.close()  # Ctrl-C: an answer that comes later must not be taken for another's
            raise
        if not line:
            self._fail(f"llama.cpp died while it was asked to {do}: {self._ending()}")
        answer = json.loads(line)
        if answer.get("errno") is not None:
            self.close()
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if "error" in answer:
            self._fail(f"{do}: {answer['error']}")
        return answer["ok"]

    def _next_line(self) -> bytes:
        end = time.monotonic() + self._request_seconds
        while True:
            left = end - time.monotonic()
            try:
                # In slices: on Windows, Ctrl-C does not get through a longer wait.
                return self._answers.get(timeout=min(WAIT_SECONDS, max(left, 0.001)))
            except queue.Empty:
                if left <= WAIT_SECONDS:
                    raise

    def _ending(self) -> str:
        code = self._process.wait(timeout=60)
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"

    def _fail(self, what: str) -> NoReturn:
        lines = self.last_lines()
        self.close()
        if any("No module named 'llama_cpp'" in line for line in lines):
            raise MissingTool(
                "the package llama-cpp-python is not installed",
                hint='in the checkout: pip install -e ".[runtime]"',
            )
        said = "".join(f"\n    {line}" for line in lines)
        raise RuntimeFailure(
            f"{what}; its last lines:{said}" if said else what,
            where=str(self._model),
            hint="the file may be damaged or made for another version of llama.cpp",
        )

    def last_lines(self) -> list[str]:
        try:
            self._printed.seek(0, os.SEEK_END)
            self._printed.seek(max(0, self._printed.tell() - 8192))
            text = self._printed.read().decode("utf-8", "replace")
        except ValueError:  # another thread has closed us
            return []
        return [line for line in text.splitlines() if line.strip(" .")][-LAST_LINES:]

    def close(self) -> None:
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()  # the child ends itself on this
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.join()
        self._printed.close()
