"""A recipe: what to distil. Read from YAML, frozen, unknown fields refused.

Every field says in its description what it is, with its unit; `edgedistill init` prints them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from edgedistill.check_specs import Check
from edgedistill.endpoint_fields import BaseUrl, KeyName
from edgedistill.errors import ConfigError, Problem
from edgedistill.field_help import Location
from edgedistill.methods import DistillSpec, ProxySpec
from edgedistill.strict import SEEDS, Strict
from edgedistill.yamlfile import Document, FieldError, load, parse


class Sampling(Strict):
    """How the teacher is asked."""

    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature; 0 is greedy")
    max_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    seed: int | None = Field(
        None, ge=0, lt=SEEDS, description="seed sent with each call, where the API takes one"
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="store with each token of an answer its log-probability and those of so many "
        "alternatives (1 to 20), for distil methods that learn from them; else leave it out",
    )

    @model_serializer(mode="wrap")
    def _serialize(self, standard: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not asked for is not named: digests of recipes that do not use it stay."""
        values: dict[str, Any] = standard(self)
        if self.top_logprobs is None:
            values.pop("top_logprobs", None)
        return values


class TeacherBase(Strict):
    """What every teacher needs."""

    model: str = Field(description="model ID sent with every call")
    licence: str = Field(description="licence or terms of the teacher's answers, for the card")
    system: str | None = Field(None, description="system prompt; the student never sees it")
    system_file: Path | None = Field(None, description="file with the system prompt instead")
    prompt_version: str | None = Field(
        None, description="your name for this teacher prompt; by default a hash of its content"
    )
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _one_system(self) -> TeacherBase:
        if self.system is not None and self.system_file is not None:
            raise ValueError("give system or system_file, not both")
        return self


class ApiTeacher(TeacherBase):
    """Any endpoint that speaks the OpenAI chat-completions API."""

    kind: Literal["api"] = Field(description="api, or local for a GGUF file on this machine")
    base_url: BaseUrl = Field(
        description="what the client puts /chat/completions behind, e.g. https://host/v1",
    )
    api_key_env: KeyName | None = Field(
        None,
        description="name of the environment variable that holds the key; leave it out for no key",
    )


class LocalTeacher(TeacherBase):
    """A GGUF file served on loopback for as long as the build needs it."""

    kind: Literal["local"] = Field(description="a GGUF file, served on this machine")
    weights: str = Field(description="a pinned name (edgedistill doctor lists them) or a GGUF path")
    port: int | None = Field(None, ge=1, le=65535, description="by default any free one")
    threads: int | None = Field(None, ge=1, description="by default the physical cores")
    context_tokens: int = Field(2048, ge=128, description="context window, in tokens")
    start_seconds: float = Field(180, gt=0, description="how long loading may take")


Teacher = Annotated[ApiTeacher | LocalTeacher, Field(discriminator="kind")]


class CollectSpec(Strict):
    """How answers are collected, and what happens when some do not come."""

    concurrency: int = Field(1, ge=1, le=256, description="calls in flight at once")
    timeout_seconds: float = Field(120, gt=0, description="longest wait for one answer")
    attempts: int = Field(5, ge=1, le=20, description="tries of one call before it is failed")
    backoff_seconds: float = Field(1.0, gt=0, description="first wait after a failure; doubles")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="stop: the first call that fails for good ends the build"
    )
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="with continue: more failed calls than this end the build"
    )


class SplitSpec(Strict):
    """How curated rows are divided, by prompt."""

    validation: float = Field(0.1, gt=0, lt=0.5, description="share for choices")
    held_out: float = Field(0.2, gt=0, lt=0.5, description="share for reported figures only")
    unseen_phrasings: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of held-out rows whose phrasing no training or validation row has",
    )
    seed: int = Field(0, ge=0, lt=SEEDS, description="seed of the split")


class CurateSpec(Strict):
    """Which answers are good enough to learn from, and how they are cleaned."""

    strip_code_fence: bool = Field(True, description="keep only what is inside a ``` block")
    collapse_whitespace: bool = Field(False, description="join the answer into one line")
    refusals: tuple[str, ...] = Field(
        ("i cannot", "i can't", "i'm sorry", "i am sorry", "as an ai"),
        description="an answer that starts with one of these (any case) is a refusal",
    )
    max_answer_chars: int = Field(4000, ge=1, description="longer answers are rejected")
    contradicted_score: float = Field(
        1.0,
        ge=0,
        le=1,
        description="what an answer counts in training that the check says is not the prompt's "
        "reference, beside 1 for all others; 0: not learnt, but measured as all are",
    )
    split: SplitSpec = SplitSpec()


class PruneSpec(Strict):
    """Layers that the student loses before it learns."""

    drop_layers: int = Field(
        ge=1, description="how many, each time the one that the token mix misses least"
    )


class StudentSpec(Strict):
    """The small model, and the prompt it will have on the device."""

    weights: str = Field(
        description="a pinned name (edgedistill doctor lists them), a GGUF path, a Hugging Face "
        "folder (./name) or a hub model (org/name@revision, 40 hex digits)"
    )
    prune: PruneSpec | None = Field(
        None, description="{drop_layers: N} takes N layers away before it learns"
    )
    system: str | None = Field(None, description="short system prompt of the student")
    prompt: str = Field("{prompt}", description="the user message; {prompt} is the user's text")
    max_tokens: int = Field(128, ge=1, description="longest answer on the device, in tokens")

    @model_validator(mode="after")
    def _has_slot(self) -> StudentSpec:
        if "{prompt}" not in self.prompt:
            raise ValueError("student.prompt must contain {prompt}")
        return self


class AddedAdapter(Strict):
    """A LoRA adapter of the same student that was trained elsewhere."""

    path: Path = Field(description="its folder, in peft's layout")
    weight: float = Field(1.0, description="by which its update is multiplied")

    @model_validator(mode="before")
    @classmethod
    def _not_a_path_alone(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise FieldError(f"write it as {{path: {given}, weight: 1}}")
        return given


class MergeSpec(Strict):
    """What is merged into the student beside what was trained."""

    adapters: tuple[AddedAdapter, ...] = Field(
        (), description="their updates are added, e.g. [{path: ../tone, weight: 1}]"
    )


class BenchSpec(Strict):
    """What is measured, and how often."""

    latency_prompts: int = Field(
        100, ge=1, description="held-out prompts asked once more, to time teacher and student"
    )
    bootstrap: int = Field(2000, ge=100, description="resamples for intervals")
    examples: int = Field(20, ge=0, description="held-out examples shown in the report")
    llama_bench_runs: int = Field(5, ge=1, description="runs of pp512 and tg128 after a warm-up")
    emulated_prompts: int = Field(
        24,
        ge=0,
        description="held-out prompts run on an emulated ARM processor, for targets that have one "
        "and are not at hand; slow (half a minute a prompt), 0 turns it off",
    )
    browser_prompts: int = Field(
        48, ge=0, description="held-out prompts asked in the browser of a wllama target; 0: none"
    )
    seed: int = Field(
        0, ge=0, lt=SEEDS, description="which prompts are timed or emulated, and of the bootstrap"
    )


class RecipeGates(Strict):
    """Bounds that fail a build (exit code 3). Agreement is a share of held-out prompts."""

    merged_agreement: float | None = Field(
        None, ge=0, le=1, description="lowest agreement of the merged model with the teacher"
    )
    merge_mean_kld: float = Field(1e-6, gt=0, description="highest mean KLD adapter to merged")
    export_mean_kld: float = Field(1e-4, gt=0, description="highest mean KLD merged to exported")
    adapter_mean_kld: float = Field(
        5e-3,
        gt=0,
        description="for `adapt`: highest mean KLD from student and adapter in torch to the "
        "bundle's quantized model and adapter in its runtime, whose kernels round",
    )


class Recipe(Strict):
    """What to distil."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="also the bundle's name")
    description: str = Field(description="one sentence for the model card")
    language: str = Field("en", description="language of the prompts, for the model card")
    prompts: Path = Field(description="the token mix, JSONL, beside the recipe")
    sample: int | None = Field(
        None, ge=1, description="so many of the prompts, drawn by their IDs; by default all"
    )
    data_licence: str = Field("unknown", description="licence of the prompts, for the model card")
    teacher: Teacher
    collect: CollectSpec = CollectSpec()
    curate: CurateSpec = CurateSpec()
    check: Check
    student: StudentSpec
    distill: DistillSpec = DistillSpec()
    merge: MergeSpec = MergeSpec()
    bench: BenchSpec = BenchSpec()
    gates: RecipeGates = RecipeGates()


Held = TypeVar("Held", StudentSpec, LocalTeacher, ProxySpec)
SYSTEM_FILE: Location = ("teacher", "system_file")
FILES: tuple[Location, ...] = (
    ("prompts",),
    SYSTEM_FILE,
    ("check", "database"),
    ("check", "file"),
    ("check", "weights"),
    ("distill", "proxy", "prompts"),
)


def load_recipe(path: Path, shown: str | None = None) -> Recipe:
    """Read `recipe.yaml` (or the folder that holds it); paths in it become absolute.

    Raises:
        ConfigError: every problem in the file, missing files included.
    """
    file = path / "recipe.yaml" if path.is_dir() else path
    document = load(file, shown)
    recipe, problems = parse(Recipe, document)
    problems += _missing_files(document, file.parent)
    if recipe is not None and (wrong := _without_logprobs(recipe)):
        location: Location = ("distill", "method")
        problems.append(Problem(document.file, document.line(location), "distill.method", wrong))
    if recipe is None or problems:
        raise ConfigError(sorted(problems, key=lambda p: p.line))
    return _resolved(recipe, file.parent.resolve())


def _without_logprobs(recipe: Recipe) -> str:
    if recipe.distill.begins_with != "logits" or recipe.teacher.sampling.top_logprobs:
        return ""
    return (
        "logits learns from the teacher's log-probabilities; ask for them with "
        "teacher.sampling.top_logprobs, for example 10"
    )


def _missing_files(document: Document, folder: Path) -> list[Problem]:
    problems = []
    for location in FILES:
        value: object = document.values
        for part in location:
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and (wrong := _unusable(folder / value, location)):
            field = ".".join(map(str, location))
            problems.append(Problem(document.file, document.line(location), field, wrong))
    return problems


def _unusable(file: Path, location: Location) -> str:
    if not file.is_file():
        return f"there is no file {file}"
    try:
        if location == SYSTEM_FILE:
            file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{file} cannot be read as UTF-8 text: {error}"
    return ""


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    teacher, check = recipe.teacher, recipe.check
    if teacher.system_file is not None:
        text = (folder / teacher.system_file).read_text("utf-8").strip()
        teacher = teacher.model_copy(update={"system": text, "system_file": None})
    paths = {name: folder / value for name, value in check if isinstance(value, Path)}
    check = check.model_copy(update=paths)
    changes: dict[str, object] = {
        "prompts": folder / recipe.prompts,
        "teacher": teacher,
        "check": check,
    }
    changes["student"] = _with_path(recipe.student, folder, _is_folder(recipe.student, folder))
    added = tuple(
        each.model_copy(update={"path": (folder / each.path).resolve()})
        for each in recipe.merge.adapters
    )
    changes["merge"] = recipe.merge.model_copy(update={"adapters": added})
    if isinstance(teacher, LocalTeacher):
        changes["teacher"] = _with_path(teacher, folder)
    if (proxy := recipe.distill.proxy) is not None:
        proxy = _with_path(proxy, folder, _is_folder(proxy, folder))
        if proxy.prompts is not None:
            proxy = proxy.model_copy(update={"prompts": folder / proxy.prompts})
        changes["distill"] = recipe.distill.model_copy(update={"proxy": proxy})
    return recipe.model_copy(update=changes)


def _is_folder(spec: StudentSpec | ProxySpec, folder: Path) -> bool:
    """Whether weights names a model folder: by its form (./name, ~/name, an absolute path), or,
    where it may be a model of the hub too, by being there."""
    named = Path(spec.weights)
    if spec.weights.startswith((".", "~")) or named.is_absolute():
        return True
    return len(named.parts) > 1 and (folder / named).is_dir()


def _with_path(spec: Held, folder: Path, is_folder: bool = False) -> Held:
    """A weights value that ends in .gguf is a path, relative to the recipe; so is a folder's."""
    if not is_folder and not spec.weights.endswith(".gguf"):
        return spec
    named = Path(spec.weights)
    path = (folder / (named.expanduser() if named.parts[:1] == ("~",) else named)).resolve()
    return spec.model_copy(update={"weights": str(path)})
