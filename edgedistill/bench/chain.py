"""The fidelity chain: what each hand-over changed, in fp32, on held-out prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from edgedistill.artifacts import write_json
from edgedistill.bench.models import Model, Recorded
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import FLOAT_BYTES, EvalRow, Kld, compare
from edgedistill.progress import Progress
from edgedistill.recipe import RecipeGates
from edgedistill.results import Link
from edgedistill.target import TargetGates

STEPS = (
    ("merge", "adapter", "merged"),
    ("export", "merged", "exported"),
    ("quantize", "exported", "quantized"),
)


def measure_chain(
    models: Mapping[str, Model], rows: Sequence[EvalRow], resume: Path, progress: Progress
) -> dict[str, Kld]:
    """KLD of each step of `STEPS` by name.

    Logits go to scratch files below `resume`, at most two at once; a finished step is kept there
    as JSON, so a killed run goes on with the step it was in.

    Raises:
        RuntimeFailure: two models of a step do not give the same number of logits.
    """
    found: dict[str, Kld] = {}
    for step, before, after in STEPS:
        kept = resume / f"link-{step}.json"
        if not kept.is_file():
            first = _recorded(models[before], rows, resume, progress)
            second = _recorded(models[after], rows, resume, progress)
            with progress.task(f"fidelity of {step}", None):
                measured = compare(first, second, _width(step, resume, before, after))
            write_json(kept, asdict(measured))
        # Past the write: a kill between the two leaves a file that the next run removes here.
        _scratch(resume, before).unlink(missing_ok=True)
        found[step] = Kld(**json.loads(kept.read_text("utf-8")))
    _scratch(resume, STEPS[-1][2]).unlink(missing_ok=True)
    return found


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
    """What `measure_chain` found out about a model of the chain while it wrote its logits."""
    return Recorded(**json.loads(_sidecar(resume, name).read_text("utf-8")))


def _width(step: str, resume: Path, before: str, after: str) -> int:
    """Vocabulary size, from the files' sizes and the number of rows written to them."""
    shapes = []
    for name in (before, after):
        count, size = recorded(resume, name).tokens, _scratch(resume, name).stat().st_size
        shapes.append((count, size // (FLOAT_BYTES * count) if count else 0))
    if shapes[0] != shapes[1] or shapes[0][1] == 0:
        raise RuntimeFailure(
            f"logits before and after the step '{step}' cannot be compared: "
            f"{shapes[0][0]} tokens x {shapes[0][1]} entries against "
            f"{shapes[1][0]} x {shapes[1][1]}",
            hint="the vocabulary of the model changed in this step",
        )
    return shapes[0][1]


def link(
    step: str, kld: Kld, agreements: Mapping[str, float], recipe: RecipeGates, target: TargetGates
) -> Link:
    """One hand-over with the bounds it is held against."""
    before, after = next((b, a) for name, b, a in STEPS if name == step)
    made = Link(
        step,
        before,
        after,
        **asdict(kld),
        agreement_before=agreements[before],
        agreement_after=agreements[after],
        gates=bounds(step, recipe, target),
        passed=True,
    )
    measured = measured_by(made)
    return replace(made, passed=all(measured[name] <= at for name, at in made.gates.items()))


def measured_by(link: Link) -> dict[str, float]:
    """A link's figures by the names its gates use."""
    return {
        "mean_kld": link.mean_kld,
        "p99_kld": link.p99_kld,
        "agreement_drop": drop(link.agreement_before, link.agreement_after),
    }


def drop(before: float, after: float) -> float:
    """Agreement lost, as a share; rounded, so that 0.89 - 0.87 is not above a bound of 0.02."""
    return round(before - after, 9)


def bounds(step: str, recipe: RecipeGates, target: TargetGates) -> dict[str, float]:
    """The bounds of one step by the name of the figure."""
    if step == "merge":
        return {"mean_kld": recipe.merge_mean_kld}
    if step == "export":
        return {"mean_kld": recipe.export_mean_kld}
    given = {
        "mean_kld": target.max_mean_kld,
        "p99_kld": target.max_p99_kld,
        "agreement_drop": target.max_agreement_drop,
    }
    return {name: bound for name, bound in given.items() if bound is not None}
