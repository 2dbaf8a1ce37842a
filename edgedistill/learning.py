"""How a recipe's student learns: what else than the teacher's text it needs is made first, then its
adapter is trained, then refined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgedistill.artifacts import Adapter, Dataset, Student, TokenTargets, Traces
from edgedistill.distill import Assigned, assigned, trained, with_precision
from edgedistill.distill.feedback import Desk
from edgedistill.distill.further import with_further
from edgedistill.distill.lesson import Pupil
from edgedistill.distill.proxy import align_proxy
from edgedistill.distill.refine import refine
from edgedistill.distill.token_targets import targets_of_proxy, targets_of_teacher
from edgedistill.methods import ProxySpec
from edgedistill.progress import Passing, Progress
from edgedistill.recipe import Recipe, StudentSpec
from edgedistill.student import prepare_student

LONGEST = 1 << 20  # tokens of a proxy's row: it never ships, so its rows may be as long as they are


def learn_recipe(
    recipe: Recipe,
    traces: Traces,
    dataset: Dataset,
    student: Student,
    out: Path,
    progress: Progress,
    retry_failed: bool = False,
) -> Adapter:
    """The adapter that the recipe's method makes of a dataset.

    Raises:
        GateFailed: step "proxy": the proxy is not close enough to the teacher.
        DatasetError: targets cover too little, or there is nothing to train on.
        TrainingError: a row breaks a promise of supervision, or a training diverges.
        EdgedistillError: see errors.py, where the teacher is asked for feedback.
    """
    prompt, spec, check = recipe.student, recipe.distill, recipe.check
    adapter = trained(first_run(recipe, traces, dataset, student, out, progress), out, progress)
    if spec.method != "on-policy":
        return adapter
    settled = with_precision(dataset, student, prompt, spec, out, progress)
    pupil = Pupil(student, prompt, settled, check, dataset)
    desk = Desk(recipe.teacher, recipe.collect, recipe.curate, out, retry_failed)
    return refine(pupil, adapter, spec.on_policy, desk, progress)


def first_run(
    recipe: Recipe,
    traces: Traces,
    dataset: Dataset,
    student: Student,
    out: Path,
    progress: Progress,
) -> Assigned:
    """The training that makes the first adapter, its targets made; for on-policy, what it starts
    with."""
    prompt, spec, check = recipe.student, recipe.distill, recipe.check
    learnt, targets = _taught(recipe, traces, dataset, student, out, progress)
    return assigned(learnt, student, prompt, spec, check, out, progress, targets)


def _taught(
    recipe: Recipe,
    traces: Traces,
    dataset: Dataset,
    student: Student,
    out: Path,
    progress: Progress,
) -> tuple[Dataset, TokenTargets | None]:
    """What the student learns: the dataset, or with a proxy's answers beside the teacher's; and
    another model's probabilities."""
    spec, prompt, cleaning = recipe.distill, recipe.student, recipe.curate
    if spec.begins_with == "logits":
        wanted = recipe.teacher.sampling.top_logprobs or 0  # validate refuses a recipe without
        targets = targets_of_teacher(
            dataset, traces, student, prompt, cleaning, wanted, spec.logits, out, progress
        )
        return dataset, targets
    if spec.begins_with == "proxy" and spec.proxy is not None:
        pupil = _proxy(recipe, spec.proxy, dataset, out, OfProxy(progress))
        proxy = align_proxy(pupil, spec.proxy, out, progress)
        if spec.proxy.prompts is not None:
            dataset = with_further(
                proxy, spec.proxy, student, prompt, spec.max_length, out, progress
            )
            proxy = replace(proxy, pupil=replace(pupil, dataset=dataset))
        targets = targets_of_proxy(
            proxy, traces, student, prompt, cleaning, spec.proxy, out, progress
        )
        return dataset, targets
    return dataset, None


def _proxy(
    recipe: Recipe, spec: ProxySpec, dataset: Dataset, out: Path, progress: Progress
) -> Pupil:
    """The proxy's model, and how it is asked and taught."""
    prompt, cleaning = (
        recipe.student.model_copy(update={"weights": spec.weights, "prune": None}),
        None,
    )
    if spec.prompt == "teacher":  # it answers as the teacher does, fences and all
        cleaning = recipe.curate
        prompt = StudentSpec(
            weights=spec.weights,
            system=recipe.teacher.system,
            max_tokens=recipe.teacher.sampling.max_tokens,
        )
    model = prepare_student(prompt, out, progress)
    taught = recipe.distill.model_copy(update=_lesson(spec))
    if spec.warm_up_epochs or spec.rounds:
        taught = with_precision(dataset, model, prompt, taught, out, progress)
    elif taught.precision == "auto":  # it is only asked, once
        taught = taught.model_copy(update={"precision": "fp32"})
    return Pupil(model, prompt, taught, recipe.check, dataset, cleaning)


def _lesson(spec: ProxySpec) -> dict[str, object]:
    return {
        "method": "sft",
        "tuning": spec.tuning,
        "lora": spec.lora,
        "seed": spec.seed,
        "batch_size": spec.batch_size,
        "max_length": LONGEST,
        "evaluations": 1,
    }


@dataclass
class OfProxy(Passing):
    """Tells the stages of the proxy's model from those of the student's."""

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        super().stage(f"{name} of the proxy", folder, reused=reused)

    def finished(self, name: str, seconds: float, peak_memory_bytes: int) -> None:
        super().finished(f"{name} of the proxy", seconds, peak_memory_bytes)
