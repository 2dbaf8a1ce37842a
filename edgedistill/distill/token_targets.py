"""Stage "targets": which tokens the teacher, or an aligned proxy, finds likely at each place of the
training answers, over the student's tokens; made once, before the student learns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.alignment import Aligned, align
from edgedistill.artifacts import (
    Dataset,
    Finished,
    Identity,
    Student,
    TokenTargets,
    Traces,
    run_stage,
    tool_versions,
)
from edgedistill.checks.cleaning import answer_source, clean_answer
from edgedistill.distill.lesson import Job
from edgedistill.distill.proxy import Proxy
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.methods import LogitsSpec, ProxySpec
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import CurateSpec, StudentSpec
from edgedistill.spelling import STOP, Said, Source, spell
from edgedistill.targets import Coverage, TargetsWriter, require_coverage
from edgedistill.teacher_targets import CHANGED, NO_TRACE, NOT_PLACED, teacher_targets
from edgedistill.training.data import TrainingRow
from edgedistill.vocabulary import Vocabulary

FILE = "targets.safetensors"
STAGE = "targets"


def targets_of_teacher(
    dataset: Dataset,
    traces: Traces,
    student: Student,
    prompt: StudentSpec,
    cleaning: CurateSpec,
    top_logprobs: int,
    spec: LogitsSpec,
    out: Path,
    progress: Progress,
) -> TokenTargets:
    """Of the log-probabilities that the teacher's traces keep.

    Raises:
        DatasetError: they say something about too few of the answers' tokens.
        WeightsError: the student's tokens have no known bytes.
    """
    identity = Identity(
        stage=STAGE,
        version=1,
        spec={"of": "teacher", "k": top_logprobs, "cleaning": _shaping(cleaning)},
        inputs={
            "dataset": dataset.digest, "traces": traces.digest, "student": student.digest
        },
        tools=tool_versions("tokenizers"),
    )  # fmt: skip

    def work(folder: Path) -> dict[str, Any]:
        rows, shown = (
            read_rows(dataset.folder / "train.jsonl"),
            StudentPrompt(student.folder, prompt),
        )
        found = teacher_targets(
            rows, traces.file, shown, cleaning, top_logprobs, folder / FILE, progress
        )
        return found.facts()

    done = run_stage(identity, out, progress, work)
    hint = "learn from the text alone (distill.method: sft), or from a proxy (proxy)"
    _require(done, spec.min_coverage, "distill.logits.min_coverage", hint)
    return TokenTargets(done.folder, done.digest, done.folder / FILE)


def targets_of_proxy(
    proxy: Proxy,
    traces: Traces,
    student: Student,
    prompt: StudentSpec,
    cleaning: CurateSpec,
    spec: ProxySpec,
    out: Path,
    progress: Progress,
) -> TokenTargets:
    """Of a proxy's own predictions of the teacher's answers: its likeliest tokens, each row with
    its log-likelihood a token.

    A proxy that was not trained and is asked as the teacher is answers as the teacher does, with a
    code fence for example: it reads the teacher's words as they came. Any other reads them cleaned,
    as it learnt them.

    Raises:
        DatasetError: its tokens fit the student's at too few of the answers' tokens.
        WeightsError: the tokens of either have no known bytes.
    """
    as_said = spec.prompt == "teacher" and proxy.adapter is None
    pupil = proxy.pupil
    made_of = pupil.inputs() | {"student": student.digest}
    if proxy.adapter is not None:
        made_of["adapter"] = proxy.digest
    if as_said:
        made_of["traces"] = traces.digest
    identity = Identity(
        stage=STAGE,
        version=1,
        spec={
            "of": "proxy", "k": spec.top_k, **pupil.computing(),
            "prompt": pupil.identity()["prompt"],
            "cleaning": _shaping(cleaning) if as_said else None,
        },
        inputs=made_of,
        tools=tool_versions("torch", "transformers", "peft", "tokenizers"),
    )  # fmt: skip

    def work(folder: Path) -> dict[str, Any]:
        rows = read_rows(pupil.dataset.folder / "train.jsonl")
        texts = _said(traces.file, rows) if as_said else {row.id: row.answer for row in rows}
        reader = _ProxyReader(pupil.job(start=proxy.adapter), spec.top_k, progress)
        shown = StudentPrompt(student.folder, prompt)
        return reader.write(rows, texts, shown, cleaning if as_said else None, folder / FILE)

    done = run_stage(identity, out, progress, work)
    hint = "take a proxy of the student's own family, whose tokens are the same"
    _require(done, spec.min_coverage, "distill.proxy.min_coverage", hint)
    return TokenTargets(done.folder, done.digest, done.folder / FILE)


def _shaping(cleaning: CurateSpec) -> dict[str, Any]:
    return cleaning.model_dump(mode="json", include={"strip_code_fence", "collapse_whitespace"})


def _require(done: Finished, least: float, bound: str, hint: str) -> None:
    """Holds a reused folder, too, against the recipe's bound."""
    facts = done.facts
    coverage = Coverage(
        rows=facts["rows"],
        tokens=facts["tokens"],
        known=round(facts["coverage"] * facts["tokens"]),
        unknown=Counter(facts["rows_without_targets"]),
    )
    require_coverage(coverage, least, bound=bound, where=str(done.folder), hint=hint)


def _said(traces: Path, rows: Sequence[EvalRow]) -> dict[str, str]:
    """What the teacher said to each prompt, by the row's ID."""
    wanted = {row.id for row in rows}
    with traces.open(encoding="utf-8") as lines:
        each = (json.loads(line) for line in lines)
        return {t["prompt_id"]: t["text"] for t in each if t["prompt_id"] in wanted}


class _ProxyReader:
    """Has a proxy read answers, and writes down over the student's tokens what it expected."""

    def __init__(self, job: Job, k: int, progress: Progress) -> None:
        self._job, self._k, self._progress = job, k, progress
        self._shown = job.shown()
        self._vocabulary = self._shown.vocabulary()

    def write(
        self,
        rows: Sequence[EvalRow],
        texts: Mapping[str, str],
        student: StudentPrompt,
        cleaning: CurateSpec | None,
        into: Path,
    ) -> dict[str, Any]:
        """Targets of the tokens of `rows`' answers, from reading `texts` (by row ID), of which
        `cleaning` made the answers; None: they are the answers. Returns facts."""
        told = {row.id: why for row in rows if (why := _why_not(row, texts, cleaning))}
        read = [row for row in rows if row.id not in told]
        vocabulary, likelihoods = student.vocabulary(), []
        with (
            TargetsWriter(into, self._k) as writer,
            self._progress.task("reading the answers by the proxy", len(rows), "rows") as task,
        ):
            for row, said in zip(read, self._reading(read, texts), strict=True):
                text, answer = texts[row.id], row.answer.encode("utf-8")
                source = Source.same(text) if cleaning is None else answer_source(text, cleaning)
                steps = spell(said, source)
                ids = student.answer_ids(row.answer)
                aligned = align(ids, answer, steps, vocabulary, self._k)
                likelihoods.append(float(np.mean([token.logprob for token in said])))
                why = None if steps else NOT_PLACED
                writer.add(row.id, aligned, likelihoods[-1], why=why)
                task.advance()
            for row in (row for row in rows if row.id in told):
                nothing = Aligned.unknown(len(student.answer_ids(row.answer)), self._k)
                writer.add(row.id, nothing, math.nan, why=told[row.id])
                task.advance()
        return writer.coverage.facts() | {
            "mean_log_likelihood": float(np.mean(likelihoods)) if likelihoods else None,
            "std_log_likelihood": float(np.std(likelihoods)) if likelihoods else None,
        }

    def _reading(self, rows: Sequence[EvalRow], texts: Mapping[str, str]) -> Iterator[list[Said]]:
        """The tokens of each text, with what else the proxy expected, in its own words."""
        from edgedistill.distill.answers import asked, predictions

        shown = self._shown
        tokens = [
            TrainingRow(
                row.id,
                tuple(shown.prompt_ids(row.prompt, row.history)),
                tuple(shown.answer_ids(texts[row.id])),
            )
            for row in rows
        ]
        with asked(self._job) as learner:
            found = predictions(learner, tokens, self._k, self._job.spec.precision)
            for row, predicted in zip(tokens, found, strict=True):
                each = zip(
                    row.answer, predicted.own, predicted.ids, predicted.logprobs, strict=True
                )
                yield [
                    Said(
                        _piece(token, self._vocabulary),
                        float(own),
                        tuple(
                            (_piece(int(other), self._vocabulary), float(logprob))
                            for other, logprob in zip(ids, logprobs, strict=True)
                            if other != token
                        ),
                    )
                    for token, own, ids, logprobs in each
                ]


def _why_not(row: EvalRow, texts: Mapping[str, str], cleaning: CurateSpec | None) -> str | None:
    """Why a row has no targets, as far as that is known before anything is read."""
    if row.id not in texts:
        return NO_TRACE
    if cleaning is not None and clean_answer(texts[row.id], cleaning) != row.answer:
        return CHANGED
    return None


def _piece(token: int, vocabulary: Vocabulary) -> bytes | None:
    return STOP if token == vocabulary.stop_id else vocabulary.token_bytes(token)
