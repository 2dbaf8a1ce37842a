"""The boundary to ONNX Runtime by onnxruntime-genai. It runs in a child process (onnx_child.py),
because a damaged model can end the process: its death becomes a RuntimeFailure (see child.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgedistill import machine
from edgedistill.child import REQUEST_SECONDS, Child, Program
from edgedistill.errors import RuntimeFailure
from edgedistill.runtime import Generation

ONNX_GENAI = Program(
    runtime="onnxruntime-genai",
    module="edgedistill.onnx_child",
    packages={
        "onnxruntime_genai": "onnxruntime-genai",
        "onnxruntime": "onnxruntime",
        "onnx": "onnx",
    },
    extra="onnx",
)
CONFIG = "genai_config.json"


class OnnxGenai:
    """An ONNX model folder (genai_config.json, model.onnx, tokenizer), loaded in a child process; a
    context manager with the methods of LlamaCpp. The child also ends with us.

    `facts`: n_vocab, n_ctx, description, size (bytes of the graph and its weights), parameters,
    lookup_parameters (of an embedding that is not the head), threads, load_seconds, bos, eos,
    add_bos, add_eos.

    Raises (every method):
        RuntimeFailure: genai refused, died, or gave no answer within `request_seconds`.
        MissingTool: onnxruntime-genai is not installed.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        context_tokens: int = 1024,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        if not (model / CONFIG).is_file():
            raise RuntimeFailure(
                f"there is no {CONFIG}, so this is no ONNX model", where=str(model)
            )
        self._child = Child(ONNX_GENAI, model, request_seconds)
        try:
            self.facts: Mapping[str, Any] = self._child.ask(
                "load",
                path=str(model),
                threads=threads or machine.threads(),
                context_tokens=context_tokens,
            )
        except BaseException:
            self.close()
            raise

    def metadata(self) -> dict[str, str]:
        """The values of genai_config.json by their keys joined with dots, and `chat_template`."""
        return dict(self._child.ask("metadata"))

    def end_ids(self) -> frozenset[int]:
        """The tokens at which genai's own loop stops."""
        return frozenset(self._child.ask("end_ids"))

    def tokenize(self, text: str) -> list[int]:
        """Token IDs; special tokens in the text are parsed, no BOS is added."""
        return list(self._child.ask("tokenize", text=text))

    def detokenize(self, ids: list[int]) -> str:
        """Text of token IDs, special tokens included."""
        return str(self._child.ask("detokenize", ids=ids)) if ids else ""

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> str:
        """The conversation as genai's own template engine renders it."""
        given = [dict(message) for message in messages]
        return str(
            self._child.ask(
                "apply_chat_template", messages=given, add_generation_prompt=add_generation_prompt
            )
        )

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
        that predict `ids[first+j]`. Returns the most likely token of each row.

        `ids[:first]` goes in as a prompt and the rest one by one, as in `generate`.
        """
        return list(self._child.ask("logits", ids=ids, first=first, into=str(into)))

    def bench(self, pp: int, tg: int, runs: int, depth: int = 0) -> dict[str, list[float]]:
        """Tokens/s of each run after a warm-up, by llama-bench's convention: `pp` for a prompt of
        so many random tokens, `tg` for so many single-token decodes, both from an empty cache or
        behind `depth` tokens."""
        return dict(self._child.ask("bench", pp=pp, tg=tg, runs=runs, depth=depth))

    def peak_memory_bytes(self) -> int:
        """Largest resident size of the child so far."""
        return int(self._child.ask("peak_memory_bytes"))

    def close(self) -> None:
        """End the child. Safe to call twice."""
        self._child.close()

    def __enter__(self) -> OnnxGenai:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
