"""A white-box proxy, aligned to the black-box teacher (Proxy-KD: Chen et al. 2024, arXiv
2401.07013): first it learns the teacher's text, then, round by round, to prefer it to its own.

A round's answers are the proxy's own, drawn at temperature 1, and its DPO is held to the proxy as
it was when the round began. After each step it is measured on validation prompts; a round that does
not raise agreement is dropped and ends it. An unaligned proxy teaches worse than none, so below the
recipe's bound the build ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifacts import RESUME, Identity, run_stage, tool_versions, write_json
from edgedistill.checks import about, make_checker
from edgedistill.distill.lesson import Job, Pupil
from edgedistill.errors import GateFailed
from edgedistill.fidelity import EvalRow
from edgedistill.methods import ProxySpec
from edgedistill.progress import Progress

TOOLS = ("torch", "transformers", "peft", "accelerate", "tokenizers")
TEMPERATURE = 1.0
START, AGREEMENT, PAIRS, DRAWN = "start.json", "agreement.json", "pairs.jsonl", "drawn.jsonl"


@dataclass(frozen=True)
class Proxy:
    """A proxy as it is used: `adapter` is the folder of its weights, None where it is the model
    itself; `agreement` with the teacher on validation prompts."""

    pupil: Pupil
    adapter: Path | None
    digest: str
    agreement: float


def align_proxy(pupil: Pupil, spec: ProxySpec, out: Path, progress: Progress) -> Proxy:
    """Stage "proxy", the warm-up, and a stage "proxy-round" for each round.

    `pupil` is the proxy's model, asked as `spec.prompt` says.

    Raises:
        GateFailed: step "proxy": it agrees with the teacher on fewer than `spec.min_agreement` of
            the validation prompts.
        TrainingError: a row breaks a promise of supervision, or a training diverges.
    """
    proxy = _warmed_up(pupil, spec, out, progress)
    for number in range(1, spec.rounds + 1):
        after = _round(proxy, spec, number, out, progress)
        if after is None:
            break
        proxy = after
    require_aligned(proxy, spec)
    return proxy


def require_aligned(proxy: Proxy, spec: ProxySpec) -> None:
    """Raise where a proxy is not close enough to the teacher to teach in its place.

    Raises:
        GateFailed: names its agreement and the bound.
    """
    if proxy.agreement >= spec.min_agreement:
        return
    count = len(proxy.pupil.job().exam().rows)
    raise GateFailed(
        "proxy",
        f"the proxy gives the teacher's answer to {proxy.agreement:.3f} of {count} validation "
        f"prompts, below distill.proxy.min_agreement ({spec.min_agreement:g})",
        where=spec.weights,
        hint="an unaligned proxy teaches worse than none: raise distill.proxy.warm_up_epochs or "
        "rounds, take a larger proxy, or set distill.method to sft; the teacher is not asked again",
    )


def _warmed_up(pupil: Pupil, spec: ProxySpec, out: Path, progress: Progress) -> Proxy:
    learns = spec.warm_up_epochs > 0
    trained = pupil.spec.model_copy(
        update={"epochs": spec.warm_up_epochs, "learning_rate": spec.learning_rate}
        if learns
        else {}
    )
    identity = Identity(
        stage="proxy",
        version=1,
        spec={**pupil.identity(), **_training(trained if learns else None, pupil)},
        inputs=pupil.inputs(),
        tools=tool_versions(*TOOLS),
    )
    job = replace(pupil, spec=trained).job(label="proxy", hint="lower distill.proxy.learning_rate")

    def work(folder: Path) -> dict[str, Any]:
        from edgedistill.distill import learn

        start = _measured(job, folder / RESUME / START, progress)
        facts: dict[str, Any] = {"steps": 0, "agreement": start}
        if learns:
            facts |= learn(job, folder, progress)
            facts["agreement"] = facts["validation_agreement"]
        about = {"name": pupil.model.name, "licence": pupil.model.licence}
        facts |= {**about, "agreement_at_start": start}
        write_json(folder / AGREEMENT, {"start": start, "warmed_up": facts["agreement"]})
        return facts

    done = run_stage(identity, out, progress, work)
    facts = done.facts
    adapter = done.folder if facts["steps"] else None
    if not done.reused:
        after = f", {facts['agreement']:.3f} after its warm-up" if facts["steps"] else ""
        progress.note(
            f"proxy {pupil.model.name}: agrees with the teacher on "
            f"{facts['agreement_at_start']:.3f} of the validation prompts as it is{after}"
        )
    return Proxy(pupil, adapter, done.digest, facts["agreement"])


def _measured(job: Job, file: Path, progress: Progress) -> float:
    """Agreement of the model that the job begins with, kept in `file`."""
    from edgedistill.distill.answers import asked

    if not file.is_file():
        exam = job.exam()
        with progress.task(f"{job.label}: agreement before it learns", None), asked(job) as learner:
            found = exam.take(learner.plain, job.spec.precision)
        write_json(file, {"agreement": found.agreement})
    return float(json.loads(file.read_text("utf-8"))["agreement"])


def _round(
    before: Proxy, spec: ProxySpec, number: int, out: Path, progress: Progress
) -> Proxy | None:
    """The proxy after one more round; None where it does not agree more often."""
    pupil = before.pupil
    trained = pupil.spec.model_copy(
        update={"epochs": spec.round_epochs, "learning_rate": spec.round_learning_rate}
    )
    shaping = {"round": number, "beta": spec.beta, **_training(trained, pupil)}
    identity = Identity(
        stage="proxy-round",
        version=1,
        spec={**pupil.identity(), **shaping},
        inputs=pupil.inputs() | {"before": before.digest},
        tools=tool_versions(*TOOLS),
    )
    own = replace(pupil, spec=trained)

    def work(folder: Path) -> dict[str, Any]:
        from edgedistill.distill import learn

        pairs = folder / RESUME / PAIRS
        asked = own.job(
            start=before.adapter,
            label=f"proxy round {number}",
            hint="lower distill.proxy.round_learning_rate, or set distill.proxy.rounds to 0",
        )
        told = _pairs(asked, pupil.rows(), number, pairs, progress)
        job = asked.model_copy(update={"rows": pairs, "pairs": True, "beta": spec.beta})
        facts = learn(job, folder, progress)
        shutil.copyfile(pairs, folder / PAIRS)
        agreement = facts["validation_agreement"]
        kept = {"agreement_before": before.agreement, "agreement": agreement}
        return {**facts, **told, **kept, "kept": agreement > before.agreement}

    done = run_stage(identity, out, progress, work)
    facts = done.facts
    if not done.reused:
        progress.note(_said(number, facts))
    if not facts["kept"]:
        return None
    return Proxy(pupil, done.folder, done.digest, facts["agreement"])


def _said(number: int, facts: Mapping[str, Any]) -> str:
    kept = "kept" if facts["kept"] else "not kept, and the last"
    return (
        f"proxy round {number}: {facts['disagreements']} of {facts['answers']} own answers are not "
        f"the teacher's; agreement {facts['agreement_before']:.3f} to {facts['agreement']:.3f}: "
        f"{kept}"
    )


def _pairs(
    job: Job, rows: Sequence[EvalRow], number: int, into: Path, progress: Progress
) -> dict[str, int]:
    """Write each row's answer, and the proxy's own where that is another; facts."""
    from edgedistill.distill.answers import draw
    from edgedistill.distill.pairs import Preference
    from edgedistill.distill.preferences import usable, write_with_reference

    told = into.with_suffix(".json")
    if not told.is_file():  # written last
        into.parent.mkdir(parents=True, exist_ok=True)
        seed, kept = f"{job.spec.seed}-proxy-{number}", into.with_name(DRAWN)
        drawn = draw(job, rows, 1, TEMPERATURE, seed, kept, progress)
        checker, shown = make_checker(job.check), job.shown()
        made, others = list[Preference](), 0
        for row, (answer,) in zip(rows, drawn, strict=True):
            check = about(checker, row.prompt, row.history)
            differs = answer != row.answer and not check.same(answer, row.answer)
            others += differs
            fits = differs and usable(row, answer, shown, job.spec.max_length)
            made.append(Preference(row, answer if fits else None))
        write_with_reference(job, made, into, progress)
        pairs = sum(each.rejected is not None for each in made)
        write_json(told, {"answers": len(made), "disagreements": others, "pairs": pairs})
    found: dict[str, int] = json.loads(told.read_text("utf-8"))
    return found


def _training(spec: Any, pupil: Pupil) -> Mapping[str, Any]:
    """What of a training shapes its result, as JSON; without one, how the model computes."""
    if spec is None:
        return {"distill": None, **pupil.computing()}
    return {"distill": spec.shaping()}
