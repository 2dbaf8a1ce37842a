"""The step "in the browser": the file that ships, in its own runtime, against llama.cpp here.

WebAssembly has kernels of its own, which round differently from those of the building machine, so
a file that is the same byte by byte may still answer differently there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedistill.artifacts import write_json
from edgedistill.bench import Build
from edgedistill.bench.agreement import Answers, bootstrap
from edgedistill.bench.chain import drop
from edgedistill.bench.gates import at_least, at_most
from edgedistill.bench.latency import Timing, choose, summary
from edgedistill.bench.models import Model, supervised
from edgedistill.browser import (
    BROWSER_VARIABLE,
    WLLAMA,
    WllamaModel,
    find_browser,
    package_files,
    student_config,
)
from edgedistill.checks import Checker, about
from edgedistill.fidelity import EvalRow, per_token, rows_that_fit, summarise
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import BenchSpec
from edgedistill.results import Gate, InBrowser, Latency
from edgedistill.runtime import Generation
from edgedistill.target import TargetGates

WHO = "student in the browser"
RUNTIME = f"wllama {WLLAMA.version}"
NO_BROWSER = (
    "there is no Chromium, Chrome or Edge on this machine; install one, or name one with "
    f"{BROWSER_VARIABLE}"
)
SWITCHED_OFF = "the recipe's bench.browser_prompts is 0"


class InPage(Protocol):
    """The part of a WllamaModel that is measured."""

    @property
    def facts(self) -> Mapping[str, Any]: ...
    def render(self, prompt: str) -> str: ...
    def tokenize(self, text: str) -> list[int]: ...
    def generate(self, ids: list[int], max_tokens: int, stop_ids: frozenset[int]) -> Generation: ...
    def logits(self, ids: list[int], first: int, into: Path) -> list[int]: ...
    def peak_memory_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class Found:
    """What the step adds to a report."""

    step: InBrowser
    latencies: list[Latency]
    gates: list[Gate]


@dataclass(frozen=True)
class BrowserStep:
    """What the step needs; `open` starts the browser with the model in it."""

    open: Callable[[], AbstractContextManager[InPage]]
    native: Model  # the same file in llama.cpp on this machine
    prompt: StudentPrompt
    max_tokens: int
    spec: BenchSpec
    gates: TargetGates
    checker: Checker
    resume: Path

    def measure(self, rows: Sequence[EvalRow], native: Answers, progress: Progress) -> Found:
        """Ask `bench.browser_prompts` of the held-out rows; what a killed run asked is kept.

        Raises:
            RuntimeFailure: the browser or its page fails.
        """
        chosen = choose(rows, self.spec.browser_prompts, self.spec.seed)
        logits, skips = self._native_logits(chosen, progress)
        kept = self.resume / "in-browser.json"
        state: dict[str, Any] = {"rows": {}, "facts": {}, "cold": None, "memory": None, "reused": 0}
        if kept.is_file():
            state = json.loads(kept.read_text("utf-8"))
            state["reused"] = len(state["rows"])
        left = [row for row in chosen if row.id not in state["rows"]]
        started = time.perf_counter()
        if left:
            with (
                progress.task("answers in the browser", len(chosen), "prompts") as task,
                self.open() as page,
            ):
                task.advance(len(chosen) - len(left))
                self._answer(page, left[0])  # a warm-up that does not count
                state |= {"facts": dict(page.facts), "cold": time.perf_counter() - started}
                for row in left:
                    state["rows"][row.id] = self._row(page, row, logits, skips.get(row.id))
                    state["memory"] = page.peak_memory_bytes()
                    write_json(kept, state)
                    task.advance()
        logits.unlink(missing_ok=True)
        return self._found(chosen, native, state)

    def _native_logits(
        self, rows: Sequence[EvalRow], progress: Progress
    ) -> tuple[Path, dict[str, int]]:
        """llama.cpp's logits of the teacher's answers, and the first row of each prompt in them."""
        fitting = rows_that_fit(rows, self.prompt)
        path = self.resume / "logits-native.f32"
        if not path.is_file():
            torn = path.with_suffix(".partial")
            torn.unlink(missing_ok=True)
            with (
                progress.task("logits of quantized", len(fitting), "prompts") as task,
                self.native.open() as runs,
            ):
                runs.record(fitting, torn, task)
            torn.replace(path)
        skips, at = {}, 0
        for row in fitting:
            skips[row.id] = at
            at += len(self.prompt.answer_ids(row.answer))
        return path, skips

    def _answer(self, page: InPage, row: EvalRow) -> Generation:
        ids = self.prompt.prompt_ids(row.prompt, row.history)
        return page.generate(ids, self.max_tokens, self.prompt.stop_ids)

    def _row(self, page: InPage, row: EvalRow, logits: Path, skip: int | None) -> dict[str, Any]:
        made = self._answer(page, row)
        found = {**asdict(made), "misread": self._misread(page, row), "kld": [], "same": [],
                 "overflowed": False}  # fmt: skip
        if skip is None:
            return found
        ids, first = supervised(self.prompt, row)
        scratch = self.resume / "in-browser.f32"
        scratch.unlink(missing_ok=True)
        page.logits(ids, first, scratch)
        if np.isfinite(np.fromfile(scratch, np.float32)).all():
            kld, same = per_token(logits, scratch, int(page.facts["n_vocab"]), skip)
            found |= {"kld": kld.tolist(), "same": same.tolist()}
        else:
            found["overflowed"] = True
        scratch.unlink()
        return found

    def _misread(self, page: InPage, row: EvalRow) -> bool:
        """Whether the page makes other text or tokens of a prompt than it was trained with. It
        shows one turn only, so what was said before is rendered here."""
        text = self.prompt.render(row.prompt, row.history)
        ids = self.prompt.prompt_ids(row.prompt, row.history)
        same = bool(row.history) or page.render(row.prompt) == text
        return not (same and page.tokenize(text) == ids)

    def _same(self, row: EvalRow, text: str) -> bool:
        return about(self.checker, row.prompt, row.history).same(text, row.answer)

    def _found(self, rows: Sequence[EvalRow], native: Answers, state: Mapping[str, Any]) -> Found:
        made = [state["rows"][row.id] for row in rows]
        answers = [entry["text"].strip() for entry in made]
        pairs = list(zip(rows, answers, strict=True))
        draws = self.spec.bootstrap, self.spec.seed
        step = InBrowser(
            measured=True,
            why_not="",
            runtime=f"{RUNTIME} (llama.cpp {state['facts']['llama_cpp']}, one thread)",
            browser=state["facts"]["user_agent"],
            prompts=len(rows),
            misread=sum(entry["misread"] for entry in made),
            same_answers=bootstrap([native[r.id] == text for r, text in pairs], *draws),
            agreement=bootstrap([self._same(r, text) for r, text in pairs], *draws),
            agreement_native=bootstrap([self._same(r, native[r.id]) for r in rows], *draws),
            kld=_kld(made),
            overflowed=sum(entry["overflowed"] for entry in made),
        )
        timings = [
            Timing(entry["total_seconds"], entry["time_to_first_token"], len(entry["ids"]))
            for entry in made
        ]
        latency = summary(WHO, timings, state["cold"], state["memory"], state["reused"])
        return Found(step, [latency], bounds(step, self.gates) + _speed(latency, self.gates))


def browse(
    build: Build,
    rows: Sequence[EvalRow],
    prompt: StudentPrompt,
    context_tokens: int,
    native: Model,
    answers: Answers,
    checker: Checker,
    resume: Path,
    progress: Progress,
) -> Found:
    """The step for a build whose target runs in a browser; `answers` are llama.cpp's."""
    browser, spec = find_browser(), build.recipe.bench
    if browser is None or not spec.browser_prompts:
        why = SWITCHED_OFF if not spec.browser_prompts else NO_BROWSER
        progress.note(f"{build.target.name}: nothing was measured in a browser: {why}")
        return not_measured(why)
    model, most = build.quantized.model, build.recipe.student.max_tokens
    config = student_config(model, prompt, max_tokens=most, context_tokens=context_tokens)
    files = package_files(progress)
    step = BrowserStep(
        lambda: WllamaModel(browser, model, config, files),
        native, prompt, most, spec, build.target.gates, checker, resume,
    )  # fmt: skip
    return step.measure(rows, answers, progress)


def not_measured(why: str) -> Found:
    """The step where it cannot be made: said so, never left out."""
    step = InBrowser(False, why, RUNTIME, "", 0, 0, None, None, None, None, 0)
    return Found(step, [], [])


def bounds(step: InBrowser, gates: TargetGates) -> list[Gate]:
    """The target's bounds on a quantized file hold in the browser, too."""
    made = [at_most("bench", "browser_misread", 0, step.misread)]
    if step.kld is not None:
        made += [
            at_most("browser", name, bound, step.kld[name])
            for name, bound in (("mean_kld", gates.max_mean_kld), ("p99_kld", gates.max_p99_kld))
            if bound is not None
        ]
    if step.agreement is not None and step.agreement_native is not None:
        # One prompt more or less is no finding, however few were asked.
        bound = max(gates.max_agreement_drop, 1 / step.prompts)
        lost = drop(step.agreement_native.value, step.agreement.value)
        made.append(at_most("browser", "agreement_drop", round(bound, 9), lost))
    return made


def _speed(latency: Latency, gates: TargetGates) -> list[Gate]:
    bound = gates.min_tokens_per_second
    if bound is None:
        return []
    return [at_least("bench", "tokens_per_second", bound, latency.tokens_per_second.p50)]


def _kld(made: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    values = [value for entry in made for value in entry["kld"]]
    if not values:
        return None
    same = [flag for entry in made for flag in entry["same"]]
    return asdict(summarise(np.array(values), np.array(same)))
