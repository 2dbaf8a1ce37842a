"""On-policy refinement: the student answers training prompts itself, and learns from where it is
wrong (DAgger's idea: Ross et al. 2011, arXiv 1011.0686; for language models: Agarwal et al. 2024,
arXiv 2306.13649). Stage "refine", one folder a round.

A round goes on from the best adapter so far. The first that does not raise validation agreement is
the last, and not kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    RESUME,
    Adapter,
    Finished,
    Identity,
    run_stage,
    tool_versions,
    write_atomic,
    write_json,
)
from edgedistill.checks import make_checker
from edgedistill.distill.feedback import CALLS, Assessed, Desk, Verdict, assess
from edgedistill.distill.lesson import Job, Pupil, validation_agreement, write_rows
from edgedistill.fidelity import EvalRow
from edgedistill.methods import OnPolicySpec
from edgedistill.progress import Progress

TOOLS = ("torch", "transformers", "peft", "accelerate", "tokenizers")
LEARNT, DRAWN, FEEDBACK, TOLD = "learnt.jsonl", "drawn.jsonl", "feedback.jsonl", "told.json"
# Of the training of the adapter before; a round has its own.
OTHERWISE = {"epochs", "learning_rate", "evaluations", "checkpoints", "method"}


@dataclass(frozen=True)
class Round:
    """What one round begins with: `agreement` of the adapter `start` on validation prompts, and how
    many teacher calls are left."""

    number: int
    start: Adapter
    agreement: float
    calls_left: int


def refine(
    pupil: Pupil, start: Adapter, spec: OnPolicySpec, desk: Desk, progress: Progress
) -> Adapter:
    """Rounds of stage "refine", from the adapter `start` on; the best adapter, `start` included.

    Raises:
        CollectError, TeacherUnreachable, TeacherRefused: the teacher cannot give its feedback.
        TrainingError: a training diverges.
    """
    best, agreement, left = start, validation_agreement(start.folder), spec.max_calls
    for number in range(1, spec.rounds + 1):
        least = CALLS[spec.feedback]
        if least > left:
            progress.note(f"on-policy: {left} of {spec.max_calls} teacher calls are left, no more "
                          f"rounds (recipe: distill.on_policy.max_calls)")  # fmt: skip
            break
        done = _round(pupil, Round(number, best, agreement, left), spec, desk, progress)
        facts = done.facts
        left -= facts["teacher_calls"]
        if not done.reused:
            progress.note(_said(number, facts, left, spec))
        if not facts["kept"]:
            break
        best, agreement = Adapter(done.folder, done.digest, facts["steps"]), facts["agreement"]
    return best


def _round(
    pupil: Pupil, begin: Round, spec: OnPolicySpec, desk: Desk, progress: Progress
) -> Finished:
    trained = pupil.spec.model_copy(
        update={
            "epochs": spec.epochs,
            "learning_rate": spec.learning_rate,
            "evaluations": 1,
            "checkpoints": min(pupil.spec.checkpoints, 3),
        }
    )
    own = replace(pupil, spec=trained)

    def work(folder: Path) -> dict[str, Any]:
        return _work(own, begin, spec, desk, folder, progress)

    return run_stage(_identity(own, begin, spec, desk), desk.out, progress, work)


def _identity(pupil: Pupil, begin: Round, spec: OnPolicySpec, desk: Desk) -> Identity:
    asks = CALLS[spec.feedback] > 0
    return Identity(
        stage="refine",
        version=1,
        spec={
            **pupil.identity(),
            "round": begin.number,
            "on_policy": spec.model_dump(mode="json", exclude={"start", "rounds", "max_calls"}),
            "distill": {k: v for k, v in pupil.spec.shaping().items() if k not in OTHERWISE},
            "calls_left": begin.calls_left if asks else None,
            "desk": desk.identity() if asks else None,
        },
        inputs=pupil.inputs() | {"start": begin.start.digest},
        tools=tool_versions(*TOOLS),
    )


def _work(
    pupil: Pupil, begin: Round, spec: OnPolicySpec, desk: Desk, folder: Path, progress: Progress
) -> dict[str, Any]:
    from edgedistill.distill import learn

    resume = folder / RESUME
    job = pupil.job(
        start=begin.start.folder,
        label=f"round {begin.number}",
        hint="lower distill.on_policy.learning_rate",
        beta=spec.beta,
    )
    told = _lesson(pupil, job, begin, spec, desk, resume, progress)
    facts = {"steps": 0, "kept": False, **told}
    facts |= {"agreement_before": begin.agreement, "agreement": begin.agreement}
    if told["learnt"]:
        changes = {"rows": resume / LEARNT, "pairs": spec.learn == "dpo"}
        facts |= learn(job.model_copy(update=changes), folder, progress)
        facts["agreement"] = facts["validation_agreement"]
        facts["kept"] = facts["agreement"] > begin.agreement
    for name in (LEARNT, FEEDBACK):
        shutil.copyfile(resume / name, folder / name)
    return facts


def _lesson(
    pupil: Pupil,
    job: Job,
    begin: Round,
    spec: OnPolicySpec,
    desk: Desk,
    resume: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write what the round learns; figures of it. Once written it is not made again."""
    from edgedistill.distill.answers import draw
    from edgedistill.distill.preferences import write_with_reference

    if not (resume / TOLD).is_file():  # written last
        resume.mkdir(parents=True, exist_ok=True)
        rows, seed = pupil.rows(), f"{pupil.spec.seed}-round-{begin.number}"
        drawn = draw(job, rows, spec.samples, spec.temperature, seed, resume / DRAWN, progress)
        found = assess(
            rows, drawn, spec.feedback, "worse" if spec.learn == "dpo" else "right",
            make_checker(pupil.check), desk, begin.calls_left, progress,
        )  # fmt: skip
        if spec.learn == "dpo":
            pairs = _pairs(found.verdicts, job)
            write_with_reference(job, pairs, resume / LEARNT, progress)
            made = {"learnt": len(pairs), "pairs": len(pairs)}
        else:
            texts, own = _texts(found.verdicts, job)
            write_rows(resume / LEARNT, texts)
            made = {"learnt": len(texts), "own_answers_learnt": own}
        _write_feedback(resume / FEEDBACK, found)
        write_json(resume / TOLD, {**found.facts, **made})
    told: dict[str, Any] = json.loads((resume / TOLD).read_text("utf-8"))
    return told


def _pairs(verdicts: Sequence[Verdict], job: Job) -> list[Any]:
    """What is better against what is worse, where both are known and can be put to the student."""
    from edgedistill.distill.pairs import Preference
    from edgedistill.distill.preferences import usable

    shown, longest = job.shown(), job.spec.max_length
    return [
        Preference(replace(each.row, answer=each.better), each.worse)
        for each in verdicts
        if each.worse is not None
        and usable(each.row, each.worse, shown, longest)
        and usable(each.row, each.better, shown, longest)
    ]


def _texts(verdicts: Sequence[Verdict], job: Job) -> tuple[list[EvalRow], int]:
    """The student's right answers, which share the row's weight, and how many these are; where it
    has none, the better one, or the teacher's where that cannot be put to it."""
    from edgedistill.distill.preferences import usable

    shown, longest = job.shown(), job.spec.max_length
    rows, own = [], 0
    for each in verdicts:
        row = each.row
        right = [answer for answer in each.right if usable(row, answer, shown, longest)]
        for number, answer in enumerate(right, 1):
            weight = row.weight / len(right)
            rows.append(replace(row, id=f"{row.id}#{number}", answer=answer, weight=weight))
        if not right:
            fits = usable(row, each.better, shown, longest)
            rows.append(replace(row, answer=each.better if fits else row.answer))
        own += len(right)
    return rows, own


def _write_feedback(file: Path, found: Assessed) -> None:
    """One line a call."""
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in found.told)
    write_atomic(file, "".join(lines).encode())


def _said(number: int, facts: Any, left: int, spec: OnPolicySpec) -> str:
    calls, used = facts["teacher_calls"], CALLS[spec.feedback] > 0
    asked = f", {calls} teacher calls ({left} are left)" if used else ""
    beyond = facts["prompts_beyond_max_calls"]
    asked += f", {beyond} prompts beyond distill.on_policy.max_calls" if beyond else ""
    before = f"on-policy round {number}: wrong on {facts['wrong']} of {facts['prompts']} prompts"
    if not facts["learnt"]:
        return f"{before}{asked}: nothing to learn, and the last"
    kept = "kept" if facts["kept"] else "not kept, and the last"
    change = f"{facts['agreement_before']:.3f} to {facts['agreement']:.3f}"
    return f"{before}{asked}; {facts['learnt']} rows learnt; agreement {change}: {kept}"
