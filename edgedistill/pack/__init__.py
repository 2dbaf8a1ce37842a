"""Pack: everything that ships in one folder with a plain name, `dist/<recipe>-<target>/`.

The bundle is made beside its place and swapped in at the end, so a killed build never leaves half
of one. Its manifest has the form of a stage's, with the provenance of every step in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill import __version__
from edgedistill.artifacts import (
    Bundle,
    Exported,
    Identity,
    Quantized,
    Report,
    Student,
    Variant,
    digest_of,
    write_atomic,
    write_json,
)
from edgedistill.browser import WLLAMA
from edgedistill.pack.makeup import makeup
from edgedistill.pack.publishing import STAGE, publish, reduced
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe
from edgedistill.runtimes import ONNX, copy_model, size_of
from edgedistill.target import Target
from edgedistill.tuning_results import TUNED, tuned

if TYPE_CHECKING:
    from edgedistill.report.card import Card

Json = Mapping[str, Any]
FILES = ("weights", "prompts")  # fields of a recipe that may hold a path
WEIGHTS_OF = {"base": "student", "adapter": "distill", "merged": "merge"}


def shipped_student(student: Student, variant: Variant | None) -> Student:
    """The student with the tokenizer of what ships: a trimmed vocabulary numbers its tokens anew,
    and pages and texts of a bundle name some of them."""
    return student if variant is None else replace(student, folder=variant.checkpoint.folder)


def pack(
    recipe: Recipe,
    target: Target,
    report: Report,
    quantized: Quantized,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
    out: Path,
    progress: Progress,
) -> Bundle:
    """Make `out/<recipe>-<target>/`, or reuse it when it is the same and whole.

    Args:
        student: see `shipped_student`.
        chain: the manifest of every stage so far, by stage name.

    Raises:
        ArtifactError: a folder of that name is there that edgedistill did not make.
        StorageError: no space or no permission.
    """
    folder = out / f"{recipe.name}-{target.name}"
    identity = _identity(recipe, target, report, quantized, student, chain)

    def fill(making: Path) -> None:
        _fill(making, recipe, target, report, quantized, exported, student, chain, progress)

    facts = {"model": quantized.model.name, "format": quantized.format}
    return publish(folder, identity, facts, chain, fill, progress)


def _identity(
    recipe: Recipe,
    target: Target,
    report: Report,
    quantized: Quantized,
    student: Student,
    chain: Mapping[str, Json],
) -> Identity:
    shown = {"name", "description", "language", "data_licence", "teacher", "student", "distill"}
    return Identity(
        stage=STAGE,
        version=3,
        spec={
            "recipe": _without_folders(recipe.model_dump(mode="json", include=shown)),
            "target": target.model_dump(
                mode="json", include={"name", "description", "context_tokens"}
            ),
            # Of a fitting that left the student as it was, nothing is in the inputs.
            "makeup": makeup(quantized, chain),
            **{name: chain[stage]["digest"] for stage, name in TUNED.items() if stage in chain},
        },
        inputs={"report": report.digest, "quantized": quantized.digest, "student": student.digest},
        tools={"edgedistill": __version__, **_runtime(target)},
    )


def _runtime(target: Target) -> dict[str, str]:
    """What of other projects a bundle holds besides the model."""
    return {WLLAMA.name: WLLAMA.version} if target.runtime == "wllama" else {}


def _without_folders(part: Any) -> Any:
    """Weights and prompts given as a path by their file name only: where they lie changes nothing,
    and is nobody's business whom the bundle is given to."""
    if not isinstance(part, dict):
        return part
    return {
        name: Path(value).name
        if name in FILES and isinstance(value, str) and Path(value).is_absolute()
        else _without_folders(value)
        for name, value in part.items()
    }


def _fill(
    folder: Path,
    recipe: Recipe,
    target: Target,
    report: Report,
    quantized: Quantized,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
    progress: Progress,
) -> None:
    """Write everything but the manifest."""
    from edgedistill.report import render_html
    from edgedistill.report.card import Card

    figures = _figures(report, chain)
    provenance = _provenance(recipe, quantized, exported, student, chain)
    card = Card(recipe, target, student, figures, provenance)
    texts = {
        "report.html": render_html(figures, provenance),
        "MODEL_CARD.md": card.model_card(),
        "README.md": card.readme(),
    }
    if target.runtime != ONNX:
        texts["Modelfile"] = card.modelfile()  # Ollama runs no ONNX
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    # Copies, not links: users edit a bundle, and the workspace must not change with it.
    copy_model(quantized.model, folder / quantized.model.name)
    write_json(folder / report.file.name, figures)
    shutil.copyfile(report.folder / "fidelity.json", folder / "fidelity.json")
    if target.runtime == "wllama":
        for name, body in _page(card, quantized, progress).items():
            write_atomic(folder / name, body)


def _page(card: Card, quantized: Quantized, progress: Progress) -> dict[str, bytes]:
    """The page that runs the model in a browser, with the runtime it needs."""
    from edgedistill.browser import package_files, page_files, student_config

    spec = card.recipe.student
    config = student_config(
        quantized.model,
        StudentPrompt(card.student.folder, spec),
        max_tokens=spec.max_tokens,
        context_tokens=card.target.context_tokens,
    )
    return page_files(config, card.page(), package_files(progress))


def write_page(
    report: Report,
    recipe: Recipe,
    quantized: Quantized,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
) -> Path:
    """The bundle's `report.html` beside `report.json`: for a build that a gate has stopped.

    It is drawn once, and again when something else than its figures changed: they cannot.
    """
    page = report.file.with_suffix(".html")
    provenance = _provenance(recipe, quantized, exported, student, chain)
    figures = _figures(report, chain)
    mark = f"<!-- {digest_of([provenance, *tuned(chain).values()])} -->\n"
    if page.is_file() and page.read_text("utf-8").endswith(mark):
        return page
    from edgedistill.report import render_html

    write_atomic(page, (render_html(figures, provenance) + mark).encode())
    return page


def _figures(report: Report, chain: Mapping[str, Json]) -> dict[str, Any]:
    """What the build measured, and how the values it trained with were found, where that is known:
    so a sweep that was made later is shown without measuring again. `unseen_met`: lessons.py."""
    from edgedistill.report.lessons import unseen_met

    figures: dict[str, Any] = json.loads(report.file.read_text("utf-8"))
    met = unseen_met(chain)
    return figures | tuned(chain) | ({"unseen_met": met} if met else {})


def _provenance(
    recipe: Recipe,
    quantized: Quantized,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
) -> dict[str, Any]:
    from edgedistill.report.card import prompt_template
    from edgedistill.report.lessons import lessons_of

    return {
        "edgedistill": __version__,
        "teacher": _teacher(recipe),
        "student": {"base": student.title, "licence": student.licence, "source": student.source},
        "data": _data(recipe, chain),
        "prompt_template": prompt_template(student, recipe.student),
        "makeup": makeup(quantized, chain),
        "lessons": lessons_of(recipe.distill, chain),
        "proxy": _proxy(chain),
        "sizes": _sizes(exported, quantized, chain),
        "stages": {name: reduced(manifest) for name, manifest in chain.items()},
    }


def _teacher(recipe: Recipe) -> dict[str, str]:
    teacher = recipe.teacher
    shown = {"model": teacher.model, "licence": teacher.licence, "kind": teacher.kind}
    if teacher.prompt_version is not None:
        shown["prompt_version"] = teacher.prompt_version
    return shown


def _proxy(chain: Mapping[str, Json]) -> dict[str, str] | None:
    """The model between teacher and student, where there was one."""
    facts = chain["proxy"]["facts"] if "proxy" in chain else None
    return facts and {"name": facts["name"], "licence": facts["licence"]}


def _data(recipe: Recipe, chain: Mapping[str, Json]) -> dict[str, str]:
    shown = {"prompts": recipe.prompts.name, "licence": recipe.data_licence}
    digests = {f"{name}_digest": chain[name]["digest"] for name in ("collect",) if name in chain}
    return shown | digests


def _sizes(exported: Exported, quantized: Quantized, chain: Mapping[str, Json]) -> dict[str, int]:
    """Bytes of the weights of each model; a model whose stage is not in `chain` is left out."""
    sizes = {
        model: sum(
            entry["bytes"]
            for name, entry in chain[stage]["outputs"].items()
            if name.endswith(".safetensors")
        )
        for model, stage in (WEIGHTS_OF | ({"base": "prune"} if "prune" in chain else {})).items()
        if stage in chain
    }
    sizes["exported"] = size_of(exported.model)
    sizes["quantized"] = size_of(quantized.model)
    return sizes
