"""The fidelity chain: what each hand-over changed, in fp32, on held-out prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgedistill.artifacts import Variant, write_json
from edgedistill.bench.models import Model, Recorded
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import FLOAT_BYTES, EvalRow, Kld, compare
from edgedistill.progress import Progress
from edgedistill.recipe import RecipeGates
from edgedistill.results import Link
from edgedistill.target import TargetGates


@dataclass(frozen=True)
class Step:
    """One hand-over by the names of its models. Where `after` has a smaller vocabulary, `columns`
    holds the token IDs that its tokens have in `before`."""

    name: str
    before: str
    after: str
    columns: Sequence[int] | None = None


@dataclass(frozen=True)
class Change:
    """What a step changed, and the NLL of the teacher's answers (nats a token) before and after it,
    over the same rows."""

    kld: Kld
    nll_before: float
    nll_after: float


STEPS = (
    Step("merge", "adapter", "merged"),
    Step("export", "merged", "exported"),
    Step("quantize", "exported", "quantized"),
)


def steps_of(variant: Variant | None) -> tuple[Step, ...]:
    """The hand-overs of a build: `variant` is what won, None where that is a stock format.

    A fitted file goes its own way from the merged model: it computes with other weights, and what
    its runtime makes of those is the last step.
    """
    if variant is None:
        return STEPS
    steps, last = list(STEPS[:2]), "merged"
    if variant.trimmed is not None:
        steps.append(Step("trim", "merged", "trimmed", variant.kept_tokens))
        last = "trimmed"
    if variant.fitted:
        steps.append(Step("fit", last, "fitted"))
        last = "fitted"
    steps.append(Step("quantize", "exported" if last == "merged" else last, "quantized"))
    return tuple(steps)


def measure_chain(
    models: Mapping[str, Model],
    rows: Sequence[EvalRow],
    resume: Path,
    progress: Progress,
    steps: Sequence[Step] = STEPS,
) -> dict[str, Change]:
    """What each of `steps` changed, by name.

    Logits go to scratch files below `resume`, at most two at once; a finished step is kept there
    as JSON, so a killed run goes on with the step it was in.

    Raises:
        RuntimeFailure: two models of a step do not give the same number of logits.
    """
    found: dict[str, Change] = {}
    for at, step in enumerate(steps):
        kept = resume / f"link-{step.name}.json"
        if not kept.is_file():
            first = _recorded(models[step.before], rows, resume, progress)
            second = _recorded(models[step.after], rows, resume, progress)
            with progress.task(f"fidelity of {step.name}", None):
                kld = compare(first, second, _width(step, resume), step.columns)
            losses = (recorded(resume, name).nll for name in (step.before, step.after))
            write_json(kept, asdict(Change(kld, *losses)))
        # Past the write: a kill between the two leaves a file that the next run removes here.
        needed = {each.before for each in steps[at + 1 :]}
        for name in {step.before, step.after} - needed:
            _scratch(resume, name).unlink(missing_ok=True)
        found[step.name] = _kept(kept)
    return found


def _kept(file: Path) -> Change:
    found = json.loads(file.read_text("utf-8"))
    return Change(**{**found, "kld": Kld(**found["kld"])})


def _scratch(resume: Path, name: str) -> Path:
    return resume / f"logits-{name}.f32"


def _recorded(model: Model, rows: Sequence[EvalRow], resume: Path, progress: Progress) -> Path:
    """The file with a model's logits; it gets its name only when it is whole."""
    path = _scratch(resume, model.name)
    if path.is_file():
        return path
    resume.mkdir(parents=True, exist_ok=True)
    torn = path.with_suffix(".partial")
    torn.unlink(missing_ok=True)
    with (
        progress.task(f"logits of {model.name}", len(rows), "prompts") as task,
        model.open() as runs,
    ):
        recorded = runs.record(rows, torn, task)
    write_json(_sidecar(resume, model.name), asdict(recorded))
    torn.replace(path)
    return path


def _sidecar(resume: Path, name: str) -> Path:
    return resume / f"recorded-{name}.json"


def recorded(resume: Path, name: str) -> Recorded:
    """What `measure_chain` found out about a model of the chain when it last wrote its logits."""
    return Recorded(**json.loads(_sidecar(resume, name).read_text("utf-8")))


def _width(step: Step, resume: Path) -> int:
    """Vocabulary size of the model before, from the files' sizes and the number of rows in them."""
    shapes = []
    for name in (step.before, step.after):
        count, size = recorded(resume, name).tokens, _scratch(resume, name).stat().st_size
        shapes.append((count, size // (FLOAT_BYTES * count) if count else 0))
    expected = shapes[0] if step.columns is None else (shapes[0][0], len(step.columns))
    if expected != shapes[1] or shapes[0][1] == 0:
        raise RuntimeFailure(
            f"logits before and after the step '{step.name}' cannot be compared: "
            f"{shapes[0][0]} tokens x {shapes[0][1]} entries against "
            f"{shapes[1][0]} x {shapes[1][1]}",
            hint="the vocabulary of the model changed in this step",
        )
    return shapes[0][1]


def link(
    step: Step,
    change: Change,
    agreements: Mapping[str, float],
    recipe: RecipeGates,
    target: TargetGates,
) -> Link:
    """One hand-over with the bounds it is held against."""
    made = Link(
        step.name,
        step.before,
        step.after,
        **asdict(change.kld),
        agreement_before=agreements[step.before],
        agreement_after=agreements[step.after],
        gates=bounds(step, recipe, target),
        passed=True,
        nll_before=change.nll_before,
        nll_after=change.nll_after,
    )
    measured = measured_by(made)
    return replace(made, passed=all(measured[name] <= at for name, at in made.gates.items()))


def measured_by(link: Link) -> dict[str, float]:
    """A link's figures by the names its gates use."""
    return {
        "mean_kld": link.mean_kld,
        "p99_kld": link.p99_kld,
        "agreement_drop": drop(link.agreement_before, link.agreement_after),
        "nll_rise": (link.nll_after or 0.0) - (link.nll_before or 0.0),
    }


def drop(before: float, after: float) -> float:
    """Agreement lost, as a share; rounded, so that 0.89 - 0.87 is not above a bound of 0.02."""
    return round(before - after, 9)


def bounds(step: Step, recipe: RecipeGates, target: TargetGates) -> dict[str, float]:
    """The bounds of one step by the name of the figure.

    Fitting heals what trimming lost and may change predictions, so neither is held to a KLD; what
    both lost of agreement is a gate of its own (gates.py).
    """
    if step.name == "merge":
        return {"mean_kld": recipe.merge_mean_kld}
    if step.name == "export":
        return {"mean_kld": recipe.export_mean_kld}
    if step.name == "trim":
        return {}
    given: dict[str, float | None] = {"agreement_drop": target.max_agreement_drop}
    if step.name == "fit":
        given |= {"nll_rise": target.max_nll_rise}
    else:
        given |= {"mean_kld": target.max_mean_kld, "p99_kld": target.max_p99_kld}
    return {name: bound for name, bound in given.items() if bound is not None}
