"""A GGUF file run by wllama in a real browser, asked like one that llama.cpp runs (runtime.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgedistill.browser.chromium import BROWSER_VARIABLE, Chromium
from edgedistill.browser.page import measuring_files
from edgedistill.browser.serving import File, JobServer, PageFailed
from edgedistill.errors import RuntimeFailure
from edgedistill.runtime import Generation

LOAD_SECONDS = 300.0
JOB_SECONDS = 600.0
WAIT_SECONDS = 0.5


class WllamaModel:
    """A GGUF file in a headless Chromium; a context manager. The browser ends with it.

    `facts`: n_vocab, n_ctx, threads, llama_cpp (its build), user_agent, load_seconds.

    Raises (every method):
        RuntimeFailure: the browser died, the page reports an error, or no answer came in time.
    """

    def __init__(
        self,
        browser: str,
        model: Path,
        config: Mapping[str, Any],
        runtime: Mapping[str, bytes],
        *,
        load_seconds: float = LOAD_SECONDS,
        job_seconds: float = JOB_SECONDS,
    ) -> None:
        self._model, self._width, self._job_seconds = model, 0, job_seconds
        self._peak, self._answers_only = 0, True
        files: dict[str, File] = {**measuring_files(config, runtime), str(config["model"]): model}
        self._server = JobServer(files)
        try:
            self._chromium = Chromium(browser, self._server.url + "measure.html")
        except OSError as error:
            self._server.close()
            raise RuntimeFailure(
                f"the browser does not start: {error.strerror or error}",
                where=browser,
                hint=f"set {BROWSER_VARIABLE} to a program of the Chromium family; "
                "bench.browser_prompts: 0 in the recipe goes without",
            ) from error
        try:
            self.facts: Mapping[str, Any] = json.loads(self._wait("load", load_seconds))
        except BaseException:
            self.close()
            raise
        self._width = int(self.facts["n_vocab"])

    def render(self, prompt: str) -> str:
        """The text that the page makes of a user's words."""
        return str(self._ask("render", prompt=prompt))

    def tokenize(self, text: str) -> list[int]:
        """Token IDs of a rendered prompt, with a BOS where the model wants one."""
        return list(self._ask("tokenize", text=text))

    def generate(self, ids: list[int], max_tokens: int, stop_ids: frozenset[int]) -> Generation:
        """Greedy answer to the prompt `ids`, from an empty cache."""
        answer = self._ask("generate", ids=ids, max_tokens=max_tokens, stop_ids=sorted(stop_ids))
        return Generation(**answer)

    def logits(self, ids: list[int], first: int, into: Path) -> list[int]:
        """Append float32 rows [len(ids)-first, n_vocab] of log-probabilities to the file `into`:
        row j predicts `ids[first+j]`. Returns the most likely token of each row.

        wllama gives probabilities in float32 and not logits: those below 1e-45 become e^-104, and a
        row is not finite where a logit is above 88.
        """
        self.peak_memory_bytes()
        self._answers_only = False
        self._server.put({"do": "logits", "ids": ids, "first": first})
        body = self._wait("logits", self._job_seconds)
        rows = np.frombuffer(body, "<f4").reshape(len(ids) - first, self._width)
        with into.open("ab") as stream:
            stream.write(rows.astype(np.float32).tobytes())
        return [int(token) for token in rows.argmax(1)]

    def peak_memory_bytes(self) -> int | None:
        """The most resident bytes of the page's process, looked at twice a second from its load
        on, until logits are asked for: no page of a bundle does, and they are large. None where
        that is not known."""
        found = self._chromium.memory_bytes() if self._answers_only else None
        if found is not None:
            self._peak = max(self._peak, found)
        return self._peak or None

    def _ask(self, verb: str, **given: Any) -> Any:
        self._server.put({"do": verb, **given})
        return json.loads(self._wait(verb, self._job_seconds))

    def _wait(self, verb: str, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                done = self._server.result(WAIT_SECONDS)
            except PageFailed as error:
                raise self._failure(f"the browser cannot {verb}: {error}") from None
            if done is not None:
                return done
            self.peak_memory_bytes()
            code = self._chromium.exit_code()
            if code is not None:
                raise self._failure(f"the browser died while it should {verb} (exit code {code})")
        raise self._failure(f"the browser gave no answer to {verb} within {seconds:.0f} s")

    def _failure(self, what: str) -> RuntimeFailure:
        lines = self._chromium.last_lines()
        self.close()
        said = "".join(f"\n    {line}" for line in lines)
        return RuntimeFailure(
            f"{what}; its last lines:{said}" if said else what,
            where=str(self._model),
            hint="the file may be damaged, or larger than this browser's memory; "
            f"another browser is taken with {BROWSER_VARIABLE}; bench.browser_prompts: 0 in the "
            "recipe goes without one",
        )

    def close(self) -> None:
        """End the browser and the server. Safe to call twice."""
        self._chromium.close()
        self._server.close()

    def __enter__(self) -> WllamaModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
