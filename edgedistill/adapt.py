"""Adapt: a bundle that is in the field, and a LoRA adapter trained on top of the very file in it.

The recipe's `student.weights` is the bundle's GGUF file, so training starts from the weights that
apps hold, and the adapter is what the update has to carry: no weight is rounded a second time.
llama.cpp adds it when it runs. The new bundle holds the old one's model unchanged.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedistill import __version__
from edgedistill.artifacts import (
    MANIFEST,
    Adapter,
    Bundle,
    Finished,
    Identity,
    digest_of_file,
    manifest_of,
    storing,
    sync_files,
    write_atomic,
    write_json,
)
from edgedistill.bench.agreement import bootstrap
from edgedistill.browser import WEB
from edgedistill.checks import about, make_checker
from edgedistill.errors import ArtifactError, DatasetError, GateFailed, UsageError
from edgedistill.fidelity import EvalRow, Kld, compare, read_rows, record, shuffled
from edgedistill.memory import PeakMemory
from edgedistill.pack.publishing import reduced
from edgedistill.pipeline import Workspace, adapter_alone
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe, RecipeGates
from edgedistill.report.lessons import lessons_of
from edgedistill.results import Interval
from edgedistill.runtime import LlamaCpp
from edgedistill.update import read_bundle, require_gguf
from edgedistill.workspace import locked

FIGURES = "adapter.json"
PAGE = f"This is the report of the model without its adapter; with it: {FIGURES}, MODEL_CARD.md."
KLD_ROWS = 12


@dataclass(frozen=True)
class Adapted:
    """What was measured on held-out prompts: agreement with the teacher without and with the
    adapter, each with its 95 % bootstrap interval, and KL(torch || llama.cpp) of the adapted model,
    where nothing may be lost."""

    rows: int
    agreement_before: Interval
    agreement: Interval
    kld: Kld


def adapt(
    bundle: Path,
    recipe: Recipe,
    workspace: Workspace,
    into: Path,
    progress: Progress,
    type: str = "F16",
) -> Bundle:
    """Write the bundle `into`: the old one's model, and an adapter made by `recipe` on top of it,
    stored as `type` (F32, F16 or Q8_0).

    Raises:
        UsageError: the recipe's student is not the bundle's model, or asked otherwise; its runtime
            takes no adapter, or `into` is there already.
        ArtifactError: it is no bundle, or has an adapter already.
        GateFailed: step "adapt": agreement is below the recipe's gate or the old bundle's, or the
            runtime's predictions are not those that were trained.
    """
    held = read_bundle(bundle)
    require_gguf(held)
    _require_whole(held)
    model = held.folder / held.facts["model"]
    if any(name.startswith(f"{WEB}/") for name in held.manifest["outputs"]):
        raise UsageError(
            "the page of a browser bundle takes no adapter",
            where=str(bundle),
            hint="build the new bundle, and send it by `edgedistill update make`",
        )
    if held.facts.get("adapter"):
        raise ArtifactError(
            "this bundle has an adapter already",
            where=str(bundle),
            hint="adapt the bundle it was made from; the update then replaces the adapter",
        )
    if into.exists():
        raise UsageError("something is here already", where=str(into), hint="choose another name")
    trained = Path(recipe.student.weights)
    if not trained.is_file() or digest_of_file(model) != digest_of_file(trained):
        raise UsageError(
            "the recipe's student is not the model of this bundle, which apps hold",
            where=recipe.student.weights,
            hint=f"set student.weights to {model.absolute()}",
        )
    _require_its_prompt(held, recipe)
    if recipe.student.prune is not None:
        raise UsageError(
            "the recipe's student.prune would take layers away from the model that apps hold",
            where=recipe.name,
            hint="leave it out; the model in the bundle stays as it is",
        )
    adapter, stages = adapter_alone(recipe, workspace, progress, type)
    lora = stages["lora"].folder / stages["lora"].facts["file"]
    with locked(workspace.root):  # gc may not take away what is measured
        figures = measure(recipe, model, lora, adapter, stages, progress)
    require_gates(recipe.gates, figures, lora)
    return _pack(held, recipe, stages, lora, figures, into)


def _require_its_prompt(held: Finished, recipe: Recipe) -> None:
    """Run instructions, card and Modelfile of the bundle go along: they name the old prompt."""
    known = held.manifest["spec"]["recipe"]["student"]
    given = recipe.student.model_dump(mode="json")
    for field in ("system", "prompt", "max_tokens"):
        if given[field] != known[field]:
            raise UsageError(
                f"student.{field} is {given[field]!r}, and {known[field]!r} in the bundle, whose "
                "instructions tell apps to ask so",
                where=recipe.name,
                hint="take the bundle's, or build a new bundle from this recipe",
            )


def _require_whole(held: Finished) -> None:
    """What the user changed in a bundle goes along; what is gone cannot."""
    for name in held.manifest["outputs"]:
        if not (held.folder / name).is_file():
            raise ArtifactError(
                f"{name} is not there any more",
                where=str(held.folder),
                hint="get it back: `edgedistill build` makes the bundle again",
            )


def require_gates(gates: RecipeGates, figures: Adapted, lora: Path) -> None:
    """Raise when an adapter breaks a bound, or answers worse than the bundle does without it.

    Raises:
        GateFailed: names the figure and its bound.
    """
    bound, kld = gates.merged_agreement, figures.kld.mean_kld
    after, before = figures.agreement.value, figures.agreement_before.value
    found = f"agreement is {after:.3f} on held-out prompts"
    learn = "collect more traces, or change the recipe's distill; the bundle stays as it is"
    if bound is not None and after < bound:
        raise GateFailed("adapt", f"{found}, below {bound:g}", where=str(lora), hint=learn)
    if after < before:
        what = f"{found}, and {before:.3f} without the adapter"
        raise GateFailed("adapt", what, where=str(lora), hint=learn)
    if kld > gates.adapter_mean_kld:
        raise GateFailed(
            "adapt",
            f"mean KLD is {kld:.2g} from what was trained to what the runtime computes, above "
            f"{gates.adapter_mean_kld:g}",
            where=str(lora),
            hint="try --type F32; if the answers are good, raise the recipe's "
            "gates.adapter_mean_kld",
        )


def measure(
    recipe: Recipe,
    model: Path,
    lora: Path,
    adapter: Adapter,
    stages: Mapping[str, Finished],
    progress: Progress,
) -> Adapted:
    """The figures of an adapter file, written from `adapter`, on the model it is for."""
    rows = read_rows(stages["curate"].folder / "held_out.jsonl")
    if not rows:
        raise DatasetError("there are no held-out rows to measure with")
    task = _Sitting(recipe, StudentPrompt(stages["student"].folder, recipe.student), rows, progress)
    chosen = sorted(rows, key=lambda row: shuffled(row.id, 0))[:KLD_ROWS]
    with tempfile.TemporaryDirectory(prefix="edgedistill-adapt-") as name:
        scratch = Path(name)
        before = task.agreement("bundle alone", model, None)
        after = task.agreement("with the adapter", model, lora, chosen, scratch / "after.f32")
        folders = stages["student"].folder, adapter.folder
        kld = task.kld(folders, chosen, scratch / "before.f32", scratch / "after.f32")
    return Adapted(len(rows), before, after, kld)


@dataclass(frozen=True)
class _Sitting:
    recipe: Recipe
    shown: StudentPrompt
    rows: Sequence[EvalRow]
    progress: Progress

    def agreement(
        self,
        label: str,
        model: Path,
        adapter: Path | None,
        chosen: Sequence[EvalRow] = (),
        logits: Path = Path(),
    ) -> Interval:
        """Share of rows with the teacher's answer; the logits of `chosen` rows on the way."""
        checker, most = make_checker(self.recipe.check), self.recipe.student.max_tokens
        context = max(len(self._asked(row)[0]) + most for row in self.rows)
        same: list[bool] = []
        with (
            self.progress.task(label, len(self.rows), "prompts") as task,
            LlamaCpp(model, context_tokens=context, adapter=adapter) as runtime,
        ):
            for row in chosen:
                runtime.logits(*self._asked(row), logits)
            for row in self.rows:
                asked = self.shown.prompt_ids(row.prompt, row.history)
                made = runtime.generate(asked, most, self.shown.stop_ids)
                check = about(checker, row.prompt, row.history)
                same.append(check.same(self.shown.decode(made.ids).strip(), row.answer))
                task.advance(shown=f"{sum(same)} agree")
        return bootstrap(same, self.recipe.bench.bootstrap, self.recipe.bench.seed)

    def kld(
        self, folders: tuple[Path, Path], rows: Sequence[EvalRow], before: Path, after: Path
    ) -> Kld:
        """From student and adapter in torch to model and adapter in llama.cpp."""
        from edgedistill.torch_runtime import TorchModel

        adapted = TorchModel(folders[0], adapter=folders[1])
        record(adapted.logits([self._asked(row) for row in rows]), before)
        return compare(before, after, self.shown.vocab_size)

    def _asked(self, row: EvalRow) -> tuple[list[int], int]:
        asked = self.shown.prompt_ids(row.prompt, row.history)
        return asked + self.shown.answer_ids(row.answer), len(asked)


def _pack(
    held: Finished,
    recipe: Recipe,
    stages: Mapping[str, Finished],
    lora: Path,
    figures: Adapted,
    into: Path,
) -> Bundle:
    started, making = time.time(), into.with_name(f".{into.name}.making")
    with storing(into), PeakMemory() as memory:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for name in held.manifest["outputs"]:
            (making / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held.folder / name, making / name)
        shutil.copyfile(lora, making / lora.name)
        write_json(making / FIGURES, asdict(figures))
        chain = {name: done.manifest for name, done in stages.items()}
        lessons = " ".join(lessons_of(recipe.distill, chain))
        _tell(making, held.facts["model"], lora, lessons, figures)
        sync_files(making)
    facts = {**held.facts, "adapter": lora.name}
    manifest = manifest_of(_identity(held, recipe, stages), making, facts, started, memory)
    provenance = dict(held.manifest.get("provenance", {}))
    provenance |= {f"adapter {name}": reduced(done.manifest) for name, done in stages.items()}
    made_by = {"made_by": f"edgedistill {__version__}", "provenance": provenance}
    write_json(making / MANIFEST, manifest | made_by)
    making.rename(into)
    return Bundle(into, manifest["digest"], into / held.facts["model"])


def _identity(held: Finished, recipe: Recipe, stages: Mapping[str, Finished]) -> Identity:
    shown = recipe.model_dump(mode="json", include={"name", "description", "student", "distill"})
    shown["student"]["weights"] = Path(recipe.student.weights).name  # a file: adapt wants one
    return Identity(
        stage="pack",
        version=2,
        spec={**held.manifest["spec"], "recipe": {**held.manifest["spec"]["recipe"], **shown}},
        inputs={"bundle": held.digest, "lora": stages["lora"].digest},
        tools={"edgedistill": __version__},
    )


def _tell(folder: Path, model: str, lora: Path, lessons: str, figures: Adapted) -> None:
    """The adapter in every run instruction and list of files, and its figures on the pages that
    have figures."""
    listed = (
        f"| `{model}` | the model |\n",
        f"| `{model}` | the model |\n| `{lora.name}` | its adapter |\n"
        f"| `{FIGURES}` | what was measured with the adapter |\n",
    )
    commands = (
        (f"-m {model}", f"-m {model} --lora {lora.name}"),
        (f'Llama("{model}", ', f'Llama("{model}", lora_path="{lora.name}", '),
        (f"FROM ./{model}\n", f"FROM ./{model}\nADAPTER ./{lora.name}\n"),
        listed,
        ("<main>\n", f"<main>\n<p><strong>{PAGE}</strong></p>\n"),
    )
    told = _told(lora, lessons, figures)
    for name, more in (
        ("README.md", told), ("MODEL_CARD.md", told), ("Modelfile", ""), ("report.html", ""),
    ):  # fmt: skip
        if (folder / name).is_file():
            text = (folder / name).read_text("utf-8")
            for alone, together in commands:
                text = text.replace(alone, together)
            write_atomic(folder / name, (text + more).encode())


def _told(lora: Path, lessons: str, figures: Adapted) -> str:
    return f"""
## The adapter

`{lora.name}` ({lora.stat().st_size / 1e6:.1f} MB) belongs to the model: give both to the runtime
(llama.cpp: `--lora`). It was trained on top of the model as it is here. {lessons}

On {figures.rows} held-out prompts the model alone agrees with the teacher on
{_share(figures.agreement_before)}, with the adapter on {_share(figures.agreement)} (95 %
bootstrap intervals, `{FIGURES}`). Phrasings unseen in training and speed were not measured with it:
all other figures here, and those of `report.html`, are of the model alone.
"""


def _share(found: Interval) -> str:
    return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
