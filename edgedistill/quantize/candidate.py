"""One candidate: made, and measured on validation rows against the exported file.

Each is a stage of its own, so that targets which want the same candidate share it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.artifacts import (
    RESUME,
    Exported,
    Identity,
    Importance,
    Variant,
    digest_of,
    link_or_copy,
    run_stage,
    tool_versions,
    write_json,
)
from edgedistill.errors import DatasetError, GateFailed
from edgedistill.fidelity import (
    nll,
    per_token,
    read_logits,
    summarise,
)
from edgedistill.footprint import Shape, shape_of
from edgedistill.names import with_encoding
from edgedistill.onnx_builder import build_onnx
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.quantize.exam import Case, Exam, cases_of
from edgedistill.quantize_request import named_by
from edgedistill.runtime import quantize_file
from edgedistill.runtimes import Runtime, asked_ids, size_of
from edgedistill.student import KEPT_TOKENS, TOKENIZER_FILES
from edgedistill.target import Target

WITH_IMPORTANCE = ":imatrix"  # behind a stock format: quantize it with the importance matrix
FIGURES, LOGITS, PLACES = "figures.json", "exported.f32", "places.json"


@dataclass(frozen=True)
class Baseline:
    """The exported file, measured: its logits as a file, agreement and NLL on the rows, shape."""

    folder: Path
    digest: str
    agreement: float
    nll: float
    shape: Shape

    @property
    def logits(self) -> Path:
        return self.folder / LOGITS

    @property
    def tokens(self) -> int:
        """Answer tokens of all rows, as the exported file cuts them."""
        return self.logits.stat().st_size // (np.dtype(np.float32).itemsize * self.shape.vocabulary)

    def places(self) -> dict[str, Place]:
        """By row ID, in the order of the logits."""
        found = json.loads((self.folder / PLACES).read_text("utf-8"))
        return {name: Place(**place) for name, place in found.items()}


@dataclass(frozen=True)
class Place:
    """The token IDs of a row's prompt and answer; its logits start at row `skip`."""

    ids: list[int]
    skip: int


@dataclass(frozen=True)
class Made:
    """A candidate's file (for ONNX: folder) and what was measured of it (a dict of Measured).
    `own_name` is the file's name where the candidate is called `name`."""

    name: str
    own_name: str
    folder: Path
    digest: str
    file: Path
    fitted: bool
    shape: Shape
    figures: Mapping[str, float]


def measure_baseline(exported: Exported, exam: Exam, out: Path, progress: Progress) -> Baseline:
    """Stage "baseline": logits and agreement of the exported file on validation rows."""
    identity = Identity(
        stage="baseline",
        version=2,
        spec=exam.identity(),
        inputs={"exported": exported.digest, "dataset": exam.dataset.digest},
        tools=tool_versions(*exam.traits.tools),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        student = StudentPrompt(exported.folder, exam.prompt)
        cases = cases_of(exam.rows(student, progress), student)
        bench = exam.sitting(student, cases)
        agreed, likelihood = 0, []
        with (
            progress.task("measure exported", len(cases), "prompts") as task,
            bench.runtime(exported.model) as runtime,
        ):
            scratch = folder / "row.f32"
            for case in cases:
                agreed += bench.agrees(runtime, case, scratch)
                likelihood.append(nll(read_logits(scratch, len(case.answer)), case.answer))
                _append(scratch, folder / LOGITS)
                task.advance(shown=f"{agreed} agree")
            shape = shape_of(runtime)
        places = {case.row.id: Place([*case.asked, *case.answer], case.skip) for case in cases}
        write_json(folder / PLACES, {name: asdict(place) for name, place in places.items()})
        return {
            "agreement": agreed / len(cases),
            "nll": float(np.concatenate(likelihood).mean()),
            "shape": asdict(shape),
        }

    done = run_stage(identity, out, progress, work)
    facts = dict(done.facts)
    shape = Shape(**facts.pop("shape"))
    return Baseline(done.folder, done.digest, shape=shape, **facts)


def _append(scratch: Path, whole: Path) -> None:
    with whole.open("ab") as stream:
        stream.write(scratch.read_bytes())
    scratch.unlink()


def make_stock(
    name: str,
    exported: Exported,
    importance: Importance | None,
    baseline: Baseline,
    exam: Exam,
    out: Path,
    progress: Progress,
) -> Made:
    """Stage "candidate" of a stock format; `name` may end in ":imatrix"."""
    weighed = importance if name.endswith(WITH_IMPORTANCE) else None
    inputs = {} if weighed is None else {"importance": weighed.digest}

    def write(destination: Path) -> None:
        quantize_file(
            exported.model,
            destination,
            name.removesuffix(WITH_IMPORTANCE),
            importance=None if weighed is None else weighed.file,
        )

    job = _Candidate(name, exported, None, False, baseline, exam, progress)
    return job.stage({"format": name}, inputs, write, out)


def make_onnx(
    name: str,
    exported: Exported,
    target: Target,
    baseline: Baseline,
    exam: Exam,
    out: Path,
    progress: Progress,
) -> Made:
    """Stage "candidate" of an ONNX format, made from the checkpoint behind `exported`. Context and
    threads of the target are written into the model folder, so they are in its identity."""
    checkpoint = exported.checkpoint
    assert checkpoint is not None, "an ONNX export names its checkpoint"
    written = _written_settings(target)
    write = partial(build_onnx, checkpoint, format=name, **written)
    job = _Candidate(name, exported, None, False, baseline, exam, progress)
    return job.stage({"format": name, **written}, {}, write, out)


def _written_settings(target: Target) -> dict[str, Any]:
    """What of a target is written into an ONNX model folder."""
    return {"context_tokens": target.context_tokens, "threads": target.threads}


def make_variant(
    variant: Variant, baseline: Baseline, exam: Exam, out: Path, progress: Progress
) -> Made:
    """Stage "candidate" of an allocation: each matrix in the type that it was given."""
    allocation, source = variant.allocation, variant.exported
    assert source is not None, "a GGUF allocation has an export of its own"

    named = named_by(allocation.types)

    def write(destination: Path) -> None:
        quantize_file(
            source.model,
            destination,
            named,  # for no matrix: each has a type of its own
            importance=allocation.importance,
            types=allocation.types,
        )

    inputs = {"source": source.digest, "allocation": allocation.digest}
    job = _of_variant(variant, source, baseline, exam, progress)
    spec = {"types": digest_of(dict(allocation.types)), "named": named}
    return job.stage(spec, inputs, write, out)


def make_onnx_variant(
    variant: Variant,
    exported: Exported,
    target: Target,
    baseline: Baseline,
    exam: Exam,
    out: Path,
    progress: Progress,
) -> Made:
    """Stage "candidate" of an ONNX allocation, from the variant's checkpoint; `exported` is the
    student's own export, which names the file."""
    allocation, folder = variant.allocation, variant.checkpoint.folder
    written = _written_settings(target)
    types = {"types": digest_of(dict(allocation.types))}
    narrow = f"int4-{next(iter(allocation.types.values())).split('-')[1]}"

    write = partial(build_onnx, folder, format=narrow, types=allocation.types, **written)
    inputs = {"source": variant.checkpoint.digest, "allocation": allocation.digest}
    source = replace(exported, folder=folder)
    job = _of_variant(variant, source, baseline, exam, progress)
    return job.stage({**types, **written}, inputs, write, out)


def _of_variant(
    variant: Variant, source: Exported, baseline: Baseline, exam: Exam, progress: Progress
) -> _Candidate:
    return _Candidate(
        variant.name, source, variant.kept_tokens, variant.fitted, baseline, exam, progress
    )


@dataclass(frozen=True)
class _Candidate:
    name: str
    exported: Exported
    kept_tokens: Sequence[int] | None
    fitted: bool
    baseline: Baseline
    exam: Exam
    progress: Progress

    def stage(
        self, spec: Mapping[str, Any], inputs: Mapping[str, str], write: Any, out: Path
    ) -> Made:
        # Two targets may call the same allocation by two names: the name is not in the identity.
        identity = Identity(
            stage="candidate",
            version=3,
            spec={**spec, **self.exam.identity()},
            inputs={
                **inputs,
                "exported": self.exported.digest,
                "baseline": self.baseline.digest,
                "dataset": self.exam.dataset.digest,
            },
            tools=tool_versions(*self.exam.traits.tools),
        )
        label = self.name.replace(WITH_IMPORTANCE, "_imatrix")
        own_name = with_encoding(self.exported.model.name, label)

        def work(folder: Path) -> Mapping[str, Any]:
            file = folder / own_name
            self._make(file, folder / RESUME, write)
            for name in (*TOKENIZER_FILES, KEPT_TOKENS):  # what the file is prompted with
                if (self.exported.folder / name).is_file():
                    shutil.copyfile(self.exported.folder / name, folder / name)
            figures, shape = self._measure(file, folder)
            write_json(folder / FIGURES, figures)
            return {"file": file.name, "shape": asdict(shape)}

        done = run_stage(identity, out, self.progress, work)
        figures = json.loads((done.folder / FIGURES).read_text("utf-8"))
        file, shape = done.folder / done.facts["file"], Shape(**done.facts["shape"])
        return Made(
            self.name, own_name, done.folder, done.digest, file, self.fitted, shape, figures
        )

    def _make(self, file: Path, resume: Path, write: Any) -> None:
        """The file, from an earlier try that was killed while it was measured, or made now."""
        resume.mkdir(parents=True, exist_ok=True)
        kept = resume / file.name
        if not kept.exists():
            with self.progress.task(f"make {self.name}", None):
                if self.name == self.exam.traits.unquantized:  # no allocation is called so
                    self._take_exported(kept)
                else:
                    write(kept)
        link_or_copy(kept, file)

    def _take_exported(self, kept: Path) -> None:
        """All of it or nothing: an ONNX model is a folder of several files."""
        part = kept.with_name(f"{kept.name}.part")
        if part.is_dir():
            shutil.rmtree(part)
        link_or_copy(self.exported.model, part)
        os.replace(part, kept)

    def _measure(self, file: Path, folder: Path) -> tuple[dict[str, float], Shape]:
        student = StudentPrompt(self.exported.folder, self.exam.prompt)
        places = self.baseline.places()
        cases = cases_of(self.exam.chosen(list(places)), student)
        sitting = self.exam.sitting(student, cases)
        scratch = folder / RESUME / "candidate.f32"
        klds, same, likelihood, agreed = [], [], [], 0
        with (
            self.progress.task(f"measure {self.name}", len(cases), "prompts") as task,
            sitting.runtime(file) as runtime,
        ):
            shape = shape_of(runtime)
            for case in cases:
                self._same_tokens(runtime, student, case, file)
                scratch.unlink(missing_ok=True)
                agreed += sitting.agrees(runtime, case, scratch)
                if self._alike(case, place := places[case.row.id]):
                    kld, top1 = per_token(
                        self.baseline.logits,
                        scratch,
                        self.baseline.shape.vocabulary,
                        place.skip,
                        self.kept_tokens,
                    )
                    klds.append(kld)
                    same.append(top1)
                likelihood.append(nll(read_logits(scratch, len(case.answer)), case.answer))
                task.advance(shown=f"{agreed} agree")
        if not klds:
            raise DatasetError(
                f"{self.name}: no validation prompt is cut into the same tokens as before",
                hint="raise vocabulary of this allocation",
            )
        figures = {
            **asdict(summarise(np.concatenate(klds), np.concatenate(same))),
            "agreement": agreed / len(cases),
            "nll": self._nll(np.concatenate(likelihood)),
            "bytes": size_of(file),
        }
        return figures, shape

    def _nll(self, tokens: Any) -> float:
        """By the exported file's tokens: a trimmed vocabulary may cut an answer into more of them,
        most of which are certain."""
        return float(tokens.mean()) * (len(tokens) / self.baseline.tokens)

    def _same_tokens(
        self, runtime: Runtime, student: StudentPrompt, case: Case, file: Path
    ) -> None:
        """An app asks through the file's own tokenizer, which trimming may have changed."""
        asked = asked_ids(runtime, student.render(case.row.prompt, case.row.history))
        if asked != case.asked:
            raise GateFailed(
                "quantize",
                f"{self.name}: the file cuts prompt {case.row.id} into other tokens than those it "
                "was trained on",
                where=str(file),
                hint="report this prompt"
                + ("; leave vocabulary out of this allocation" if self.kept_tokens else ""),
            )

    def _alike(self, case: Case, place: Place) -> bool:
        """Whether a trimmed vocabulary cuts a row into the same tokens."""
        own, kept = [*case.asked, *case.answer], self.kept_tokens
        return (own if kept is None else [kept[i] for i in own]) == place.ids
