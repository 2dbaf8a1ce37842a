"""A recipe for large machines as it runs here: the same stages and fields with small models, so
that it can be tried end to end before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgedistill.recipe import LocalTeacher, MergeSpec, Recipe

SUFFIX = "-scaled-down"
TEACHER, PROXY = "qwen2.5-coder-1.5b-instruct", "qwen2.5-coder-0.5b-instruct-q4_k_m"
STUDENT = "smollm2-135m-instruct-q4_1"
PROMPTS, EPOCHS, ROUNDS = 80, 1.0, 1
BATCH, RANK = 4, 16
CHANGED: Any = {
    "collect": True,
    "distill": True,
    "merge": True,
    "gates": True,
    "student": {"prune"},
}


def as_asked(
    recipe: Recipe, processes: int | None = None, scaled_down: bool = False
) -> tuple[Recipe, list[str]]:
    """The recipe with what a command's options say in its place, and in words what scaling it down
    changed."""
    made, told = scale_down(recipe) if scaled_down else (recipe, [])
    if processes is not None:
        spec = made.distill.model_copy(update={"processes": processes})
        made = made.model_copy(update={"distill": spec})
    return made, told


def scale_down(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with pinned small models, a sample of its prompts and a short training, under a
    name of its own, and in words what was changed. Gates on agreement go: so little is learnt."""
    changes: dict[str, Any] = {
        "name": recipe.name + SUFFIX,
        "sample": min(PROMPTS, recipe.sample or PROMPTS),
        "teacher": _teacher(recipe),
        # A local teacher answers one call at a time: the others' wait would count as its time.
        "collect": recipe.collect.model_copy(update={"concurrency": 1}),
        "student": recipe.student.model_copy(update={"weights": STUDENT, "prune": None}),
        "distill": _distill(recipe),
        "merge": MergeSpec(),
        "gates": recipe.gates.model_copy(update={"merged_agreement": None}),
    }
    made = recipe.model_copy(update=changes)
    return made, list(_told(recipe, made))


def _teacher(recipe: Recipe) -> LocalTeacher:
    asked = recipe.teacher
    return LocalTeacher(
        kind="local",
        model=TEACHER,
        weights=f"{TEACHER}-q4_k_m",
        licence="Apache-2.0",
        system=asked.system,
        prompt_version=asked.prompt_version,
        sampling=asked.sampling,
    )


def _distill(recipe: Recipe) -> Any:
    spec = recipe.distill
    rank = min(RANK, spec.lora.rank)
    # With another ratio another rank would also be another learning rate.
    alpha = spec.lora.alpha * rank / spec.lora.rank
    lora = spec.lora.model_copy(update={"rank": rank, "alpha": alpha})
    changes: dict[str, Any] = {
        "precision": "auto",
        "tuning": "lora" if spec.tuning == "qlora" else spec.tuning,
        "lora": lora,
        "epochs": min(EPOCHS, spec.epochs),
        "batch_size": min(BATCH, spec.batch_size),
        "processes": 1,
        "evaluations": 1,
        "report_to": (),
    }
    if spec.proxy is not None:
        small = {"weights": PROXY, "tuning": "lora", "min_agreement": 0}
        changes["proxy"] = spec.proxy.model_copy(
            update={**small, "rounds": min(ROUNDS, spec.proxy.rounds)}
        )
    rounds = min(ROUNDS, spec.on_policy.rounds)
    changes["on_policy"] = spec.on_policy.model_copy(update={"rounds": rounds})
    return spec.model_copy(update=changes)


def _told(recipe: Recipe, made: Recipe) -> Iterator[str]:
    yield f"teacher {made.teacher.model} on this machine instead of {recipe.teacher.model}"
    yield f"student {made.student.weights} instead of {recipe.student.weights}"
    yield f"{made.sample} of its prompts"
    after = dict(_fields(made.model_dump(mode="json", include=CHANGED)))
    for name, old in _fields(recipe.model_dump(mode="json", include=CHANGED)):
        if after.get(name) != old:
            yield f"{name} {after.get(name)} instead of {old}"
    yield "this shows that the recipe runs; its agreement tells nothing of the full one's"


def _fields(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Each value by its name in the recipe, such as distill.lora.rank."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
