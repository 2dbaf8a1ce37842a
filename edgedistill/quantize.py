"""Quantize: make and measure each format of a target; the smallest file inside its gates wins.

Everything is measured on validation rows, so that held-out figures stay untouched by the choice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.artifacts import (
    RESUME,
    Dataset,
    Exported,
    Identity,
    Quantized,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.checks import Checker, check_identity, make_checker
from edgedistill.errors import DatasetError, GateFailed
from edgedistill.fidelity import (
    EvalRow,
    Kld,
    follows,
    per_token,
    read_rows,
    rows_that_fit,
    summarise,
)
from edgedistill.names import with_encoding
from edgedistill.progress import Progress, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Check, StudentSpec
from edgedistill.results import Candidate
from edgedistill.runtime import LlamaCpp, quantize_file
from edgedistill.target import Target

CANDIDATES = "candidates.json"
UNQUANTIZED = "F16"
MICRO_BATCH = 512  # llama.cpp's default n_ubatch, for which a device's buffers are made
MEMORY_FORMULA = (
    "file + KV cache (2 x layers x KV heads x head size x context x 2 B) + buffers "
    "(min(512, context) x (vocabulary + 2 x width) x 4 B)"
)


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory at run time, and its parameter count."""

    layers: int
    kv_heads: int
    head_size: int
    width: int
    vocabulary: int
    parameters: int


@dataclass(frozen=True)
class Baseline:
    """The exported file, measured: where its logits are, its agreement on the rows, its shape."""

    logits: Path
    agreement: float
    shape: Shape


@dataclass(frozen=True)
class Case:
    """One validation row as token IDs; its answer's logits start at row `skip` of the baseline."""

    row: EvalRow
    asked: list[int]
    answer: list[int]
    skip: int


def quantize(
    exported: Exported,
    dataset: Dataset,
    prompt: StudentSpec,
    check: Check,
    target: Target,
    out: Path,
    progress: Progress,
) -> Quantized:
    """Stage "quantize": the winning file, and `candidates.json` (a list of results.Candidate).

    A candidate that was made and measured is kept in `resume` and not made again after a kill.

    Raises:
        GateFailed: step "quantize": no format is inside the target's bounds; `candidates.json` and
            all files stay in the unfinished folder.
        RuntimeFailure: llama.cpp cannot make or run a candidate.
    """
    identity = Identity(
        stage="quantize",
        version=1,
        spec={
            "target": _target_spec(target),
            "check": check_identity(check),
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt", "max_tokens"}),
        },
        inputs={"exported": exported.digest, "dataset": dataset.digest},
        tools=tool_versions("llama-cpp-python"),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        student = StudentPrompt(exported.folder, prompt)
        cases = _cases(_rows(dataset, student, progress), student)
        checker = make_checker(check)
        return _Job(
            exported.model, target, student, prompt.max_tokens, checker, cases, folder, progress
        ).run()

    done = run_stage(identity, out, progress, work)
    return Quantized(
        done.folder, done.digest, done.folder / done.facts["file"], done.facts["format"]
    )


def _rows(dataset: Dataset, student: StudentPrompt, progress: Progress) -> list[EvalRow]:
    """The validation rows that a format is chosen on."""
    every = read_rows(dataset.folder / "validation.jsonl")
    rows = rows_that_fit(every, student)
    if not rows:
        raise DatasetError(
            "there are no validation rows to choose a format on",
            hint="raise curate.split.validation, or give more prompts",
        )
    if len(rows) < len(every):
        progress.note(
            f"formats are chosen on {len(rows)} of {len(every)} validation prompts: "
            "the logits of more do not fit into 2 GB of scratch space"
        )
    return rows


@dataclass(frozen=True)
class _Job:
    exported: Path
    target: Target
    student: StudentPrompt
    max_tokens: int
    checker: Checker
    cases: Sequence[Case]
    folder: Path
    progress: Progress

    def run(self) -> Mapping[str, Any]:
        self.resume.mkdir(exist_ok=True)
        baseline = self._baseline()
        measured = [self._candidate(name, baseline) for name in self.target.formats]
        best = min(
            (c for c in measured if c.passed), key=lambda c: (c.bytes, c.mean_kld), default=None
        )
        table = [replace(c, chosen=c is best) for c in measured]
        write_json(self.folder / CANDIDATES, [asdict(c) for c in table])
        if best is None:
            raise _none_passes(table, self.target, self.folder)
        file = self._take(best.format)
        self.progress.note(
            f"format {best.format}: the smallest of {len(table)} inside the gates of target "
            f"{self.target.name} ({best.bytes / 1e6:.1f} MB)"
        )
        return {
            "file": file.name,
            "format": best.format,
            "validation_rows": len(self.cases),
            "memory_formula": MEMORY_FORMULA,
        }

    @property
    def resume(self) -> Path:
        return self.folder / RESUME

    def _baseline(self) -> Baseline:
        """Logits (kept as a file) and agreement of the exported file."""
        logits, kept = self.resume / "exported.f32", self.resume / "exported.json"
        if not kept.is_file():
            logits.unlink(missing_ok=True)
            agreed = 0
            with self._task("measure exported") as task, self._runtime(self.exported) as runtime:
                for case in self.cases:
                    agreed += self._agrees(runtime, case, logits)
                    task.advance(shown=f"{agreed} agree")
                shape = _shape(runtime)
            write_json(kept, {"agreement": agreed / len(self.cases), "shape": asdict(shape)})
        found = json.loads(kept.read_text("utf-8"))
        return Baseline(logits, found["agreement"], Shape(**found["shape"]))

    def _candidate(self, name: str, baseline: Baseline) -> Candidate:
        """The candidate's figures, from an earlier run or made and measured now."""
        file = self._file(name)
        kept = self.resume / f"{name}.json"
        if not (kept.is_file() and file.is_file()):
            if not file.is_file():
                with self.progress.task(f"make {name}", None):
                    quantize_file(self.exported, file, name, self.target.threads)
            kld, agreement = self._measure(name, file, baseline)
            write_json(kept, {**asdict(kld), "agreement": agreement})
        found = json.loads(kept.read_text("utf-8"))
        size, shape = file.stat().st_size, baseline.shape
        candidate = Candidate(
            format=name,
            bytes=size,
            bits_per_weight=round(size * 8 / shape.parameters, 3),
            mean_kld=found["mean_kld"],
            p99_kld=found["p99_kld"],
            top1=found["top1"],
            agreement=found["agreement"],
            agreement_before=baseline.agreement,
            estimated_memory_bytes=size + run_time_bytes(shape, self.target.context_tokens),
            passed=False,
            why_not="",
            chosen=False,
        )
        broken = broken_bounds(candidate, self.target)
        return replace(candidate, passed=not broken, why_not="; ".join(b.text for b in broken))

    def _measure(self, name: str, file: Path, baseline: Baseline) -> tuple[Kld, float]:
        if name == UNQUANTIZED:  # the exported file itself
            rows = sum(len(case.answer) for case in self.cases)
            return Kld(0.0, 0.0, 0.0, 1.0, rows), baseline.agreement
        scratch = self.resume / "candidate.f32"
        klds, same, agreed = [], [], 0
        with self._task(f"measure {name}") as task, self._runtime(file) as runtime:
            for case in self.cases:
                scratch.unlink(missing_ok=True)
                agreed += self._agrees(runtime, case, scratch)
                vocabulary = baseline.shape.vocabulary
                kld, top1 = per_token(baseline.logits, scratch, vocabulary, case.skip)
                klds.append(kld)
                same.append(top1)
                task.advance(shown=f"{agreed} agree")
        scratch.unlink(missing_ok=True)
        return summarise(np.concatenate(klds), np.concatenate(same)), agreed / len(self.cases)

    def _agrees(self, runtime: LlamaCpp, case: Case, logits: Path) -> bool:
        """Append the logits of the teacher's answer to `logits`; does the check call the greedy
        answer the same?"""
        likely = runtime.logits(case.asked + case.answer, len(case.asked), logits)
        if follows(likely, case.answer, self.max_tokens):
            return self.checker.same(case.row.answer, case.row.answer)
        made = runtime.generate(case.asked, self.max_tokens, self.student.stop_ids)
        return self.checker.same(self.student.decode(made.ids).strip(), case.row.answer)

    def _runtime(self, model: Path) -> LlamaCpp:
        longest = max(
            len(case.asked) + max(len(case.answer), self.max_tokens) for case in self.cases
        )
        context = max(self.target.context_tokens, longest)
        return LlamaCpp(model, threads=self.target.threads, context_tokens=context)

    def _task(self, label: str) -> Task:
        return self.progress.task(label, len(self.cases), "prompts")

    def _file(self, name: str) -> Path:
        if name == UNQUANTIZED:
            return self.exported
        return self.resume / with_encoding(self.exported.name, name)

    def _take(self, name: str) -> Path:
        """Move the winner out of `resume`, which goes when the stage is complete."""
        made = self._file(name)
        file = self.folder / made.name
        if name == UNQUANTIZED:
            shutil.copyfile(made, file)
        else:
            os.replace(made, file)
        return file


def run_time_bytes(shape: Shape, context_tokens: int) -> int:
    """KV cache in f16 and llama.cpp's compute buffers, in bytes: MEMORY_FORMULA without the file.

    Both terms equal what llama.cpp itself reports for the two supported architectures.
    """
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * context_tokens * 2
    buffers = min(MICRO_BATCH, context_tokens) * (shape.vocabulary + 2 * shape.width) * 4
    return cache + buffers


@dataclass(frozen=True)
class Broken:
    """A bound that a candidate breaks; `factor` is how far, as measured over bound."""

    text: str
    factor: float


def broken_bounds(candidate: Candidate, target: Target) -> list[Broken]:
    """The target's bounds that the candidate is outside of."""
    gates = target.gates
    drop = round(candidate.agreement_before - candidate.agreement, 9)
    bounds = (
        ("file", candidate.bytes / 1e6, gates.max_file_mb, " MB"),
        ("memory", candidate.estimated_memory_bytes / 1e6, target.memory_budget_mb, " MB"),
        ("mean KLD", candidate.mean_kld, gates.max_mean_kld, ""),
        ("p99 KLD", candidate.p99_kld, gates.max_p99_kld, ""),
        ("agreement drop", drop, gates.max_agreement_drop, ""),
    )
    return [
        Broken(f"{name} {_shown(value)}{unit} > {_shown(bound)}{unit}", _factor(value, bound))
        for name, value, bound, unit in bounds
        if bound is not None and not value <= bound
    ]


def _shown(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _factor(value: float, bound: float) -> float:
    return value / bound if bound else 1 + value


def _none_passes(table: Sequence[Candidate], target: Target, folder: Path) -> GateFailed:
    lines = [f"\n    {c.format}: {c.why_not}" for c in table]
    closest = min(table, key=lambda c: max(b.factor for b in broken_bounds(c, target)))
    return GateFailed(
        "quantize",
        f"no format is inside the bounds of target {target.name}:" + "".join(lines),
        where=str(folder),
        hint=f"closest is {closest.format}; loosen its bound, or add formats to the target "
        f"(all figures: {CANDIDATES} there)",
    )


def _cases(rows: Sequence[EvalRow], student: StudentPrompt) -> list[Case]:
    cases, skip = [], 0
    for row in rows:
        answer = student.answer_ids(row.answer)
        cases.append(Case(row, student.prompt_ids(row.prompt, row.history), answer, skip))
        skip += len(answer)
    return cases


def _shape(runtime: LlamaCpp) -> Shape:
    found = runtime.metadata()
    architecture = found["general.architecture"]

    def number(key: str, default: int = 0) -> int:
        return int(found.get(f"{architecture}.{key}", default))

    heads, width = number("attention.head_count"), number("embedding_length")
    return Shape(
        layers=number("block_count"),
        kv_heads=number("attention.head_count_kv", heads),
        head_size=number("attention.key_length", width // heads),
        width=width,
        vocabulary=runtime.facts["n_vocab"],
        parameters=runtime.facts["parameters"],
    )


def _target_spec(target: Target) -> dict[str, Any]:
    """What of a target decides which file wins; a speed gate is held later, in bench."""
    spec = target.model_dump(
        mode="json", include={"formats", "threads", "context_tokens", "memory_budget_mb", "gates"}
    )
    spec["gates"].pop("min_tokens_per_second")
    return spec
