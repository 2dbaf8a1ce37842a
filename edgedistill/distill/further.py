"""Stage "proxy-answers": prompts that the teacher was never asked, answered by an aligned proxy.

A narrow task is limited by how many of its prompts are learnt, and calls cost money: the proxy,
which agrees with the teacher more often than the student does, answers the rest of what users send
(pseudo-labels of a larger model: Xie et al. 2020, arXiv 1911.04252). What it is less sure of, and
what the check finds no valid answer, is left out. Its probabilities of these answers teach more
than those of answers that it has learnt by heart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    PARTS,
    RESUME,
    Dataset,
    Identity,
    Student,
    TokenMixEntry,
    dataset_of,
    digest_of,
    link_or_copy,
    run_stage,
    tool_versions,
)
from edgedistill.checks import make_checker
from edgedistill.distill.lesson import Job
from edgedistill.distill.proxy import TOOLS, Proxy
from edgedistill.errors import DatasetError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.methods import ProxySpec
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.tokenmix import TokenMix, phrasing, read_token_mix, same_prompt

STAGE, DRAWN = "proxy-answers", "answers.jsonl"
MARK = "proxy/"  # before the IDs of its rows


def with_further(
    proxy: Proxy,
    spec: ProxySpec,
    student: Student,
    prompt: StudentSpec,
    max_length: int,
    out: Path,
    progress: Progress,
) -> Dataset:
    """The proxy's dataset, to whose training rows the proxy's answers to `spec.prompts` are added.

    Prompts that the teacher was asked are passed over, also those of rejected answers, and rows of
    more than `max_length` of the student's tokens, asked by `prompt`, are left out.

    Raises:
        TokenMixError: the prompts cannot be read.
        DatasetError: none of them is left to answer, or none of its answers can be used.
    """
    assert spec.prompts is not None
    mix, pupil = read_token_mix(spec.prompts), proxy.pupil
    refused = _refused(pupil.dataset)
    inputs = pupil.inputs() | {"prompts": mix.digest, "proxy": proxy.digest}
    identity = Identity(
        stage=STAGE,
        version=2,
        spec={
            "keep": spec.keep,
            **pupil.identity(),
            **pupil.computing(),
            "refused": digest_of(sorted(refused)),
            "student": prompt.model_dump(mode="json", exclude={"weights", "prune"}),
            "max_length": max_length,
        },
        inputs=inputs | {"student": student.digest},
        tools=tool_versions(*TOOLS),
    )
    job = pupil.job(start=proxy.adapter, label="proxy")

    def work(folder: Path) -> dict[str, Any]:
        from edgedistill.distill.preferences import usable

        shown = StudentPrompt(student.folder, prompt)

        def fits(row: EvalRow) -> bool:
            return usable(row, row.answer, shown, max_length)

        rows = _unknown(mix, pupil.dataset, refused)
        return _work(job, rows, fits, pupil.dataset, spec, folder, progress)

    done = run_stage(identity, out, progress, work)
    if not done.reused:
        progress.note(
            f"the proxy answered {done.facts['asked']} further prompts; {done.facts['kept']} of "
            "its answers are learnt beside the teacher's"
        )
    return dataset_of(done, pupil.dataset.train + done.facts["kept"], pupil.dataset)


def _work(
    job: Job,
    rows: Sequence[EvalRow],
    fits: Callable[[EvalRow], bool],
    dataset: Dataset,
    spec: ProxySpec,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    if not rows:
        raise DatasetError(
            "the teacher was asked all of these prompts",
            where=str(spec.prompts),
            hint="give prompts that the recipe's own `prompts` do not have, or leave "
            "distill.proxy.prompts out",
        )
    made, left_out = _answered(job, rows, folder, progress)
    short = [row for row in made if fits(row)]
    if len(short) < len(made):
        left_out["longer than distill.max_length"] = len(made) - len(short)
    kept, mean = _surest(job, short, spec.keep, progress)
    if not kept:
        told = ", ".join(f"{count} {why}" for why, count in left_out.most_common(3))
        raise DatasetError(
            f"no answer of the proxy to {len(rows)} further prompts can be used: {told}",
            where=str(spec.prompts),
            hint="take a larger proxy, or leave distill.proxy.prompts out",
        )
    _write(folder, dataset, kept)
    worded = {row.phrasing for row in kept}
    held_out = read_rows(dataset.folder / "held_out.jsonl")
    return {
        # The report calls these unseen: the teacher's answers have no such wording, these may.
        "unseen_met": sum(not row.seen and row.phrasing in worded for row in held_out),
        "asked": len(rows),
        "kept": len(kept),
        "less_sure": len(short) - len(kept),
        "unusable": dict(left_out),
        "mean_log_likelihood": mean,
    }


def _unknown(mix: TokenMix, dataset: Dataset, refused: Collection[str]) -> list[EvalRow]:
    """Rows without an answer yet, of prompts that the teacher was not asked, each once."""
    had = {_same(row) for part in PARTS for row in read_rows(dataset.folder / f"{part}.jsonl")}
    rows = []
    for entry in mix.entries:
        row = _row(entry)
        if (key := _same(row)) not in had and same_prompt([row.prompt]) not in refused:
            had.add(key)
            rows.append(row)
    return rows


def _refused(dataset: Dataset) -> set[str]:
    """The last messages, as `same_prompt` has them, to which no answer of the teacher's was used:
    what it refused is not for the proxy to answer in its place."""
    with (dataset.folder / "rejected.jsonl").open(encoding="utf-8") as lines:
        return {same_prompt([json.loads(line)["prompt"]]) for line in lines}


def _same(row: EvalRow) -> str:
    return same_prompt([*(said["content"] for said in row.history), row.prompt])


def _row(entry: TokenMixEntry) -> EvalRow:
    return EvalRow(
        id=f"{MARK}{entry.id}",
        prompt=entry.prompt,
        answer="",
        phrasing=phrasing(entry),
        seen=True,
        weight=entry.weight,
        history=entry.messages[:-1],
    )


def _answered(
    job: Job, rows: Sequence[EvalRow], folder: Path, progress: Progress
) -> tuple[list[EvalRow], Counter[str]]:
    """Rows with the proxy's likeliest answers, and how many have none that can be used, by why."""
    from edgedistill.distill.answers import draw
    from edgedistill.distill.preferences import usable

    kept = folder / RESUME / DRAWN
    kept.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(job, rows, 1, 0.0, STAGE, kept, progress, cut="")
    checker, shown = make_checker(job.check), job.shown()
    made, left_out = list[EvalRow](), Counter[str]()
    for row, (answer,) in zip(rows, drawn, strict=True):
        if not usable(row, answer, shown, job.spec.max_length):
            left_out["empty or cut off"] += 1
        elif (wrong := checker.invalid(answer)) is not None:
            left_out[wrong.split(":")[0]] += 1
        else:
            made.append(replace(row, answer=answer))
    return made, left_out


def _surest(
    job: Job, rows: Sequence[EvalRow], share: float, progress: Progress
) -> tuple[list[EvalRow], float | None]:
    """The share of the rows whose answers it finds likeliest, in nats a token; and the mean of
    those."""
    from edgedistill.distill.answers import asked, log_likelihoods
    from edgedistill.training.data import training_rows

    if not rows:
        return [], None
    tokens = training_rows(rows, job.shown(), job.spec.max_length)
    with progress.task("proxy: how sure it is", None), asked(job) as learner:
        whole = log_likelihoods(learner, tokens, job.spec.precision)
    each = {row.id: found / len(row.answer) for row, found in zip(tokens, whole, strict=True)}
    surest = sorted(rows, key=lambda row: -each[row.id])[: max(1, round(share * len(rows)))]
    ids = {row.id for row in surest}
    return [row for row in rows if row.id in ids], sum(each[i] for i in ids) / len(ids)


def _write(folder: Path, dataset: Dataset, further: Sequence[EvalRow]) -> None:
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in further)
    own = (dataset.folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(own + "".join(lines).encode())
    for name in ("validation", "held_out", "rejected"):
        link_or_copy(dataset.folder / f"{name}.jsonl", folder / f"{name}.jsonl")
