"""Pack: everything that ships in one folder with a plain name, `dist/<recipe>-<target>/`.

The bundle is made beside its place and swapped in at the end, so a killed build never leaves half
of one. Its manifest has the form of a stage's, with the provenance of every step in it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill import __version__
from edgedistill.artifacts import (
    MANIFEST,
    Bundle,
    Exported,
    Finished,
    Identity,
    Quantized,
    Report,
    Student,
    digest_of,
    digest_of_file,
    load_finished,
    manifest_of,
    storing,
    sync_files,
    write_atomic,
    write_json,
)
from edgedistill.browser import WLLAMA
from edgedistill.errors import ArtifactError
from edgedistill.memory import PeakMemory
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import Recipe
from edgedistill.target import Target

if TYPE_CHECKING:
    from edgedistill.report.card import Card

Json = Mapping[str, Any]
STAGE = "pack"
KEPT = ("stage", "key", "digest", "spec", "inputs", "tools", "started", "wall_seconds",
        "peak_memory_bytes", "teacher_server_peak_memory_bytes")  # fmt: skip
# Where a folder in optimum's layout is used, and what is said of each of its model files.
OPTIMUM_README = """\
# {name}, for ONNX Runtime

{base} ({licence}), distilled by edgedistill for: {description}

{table}

KLD in nats, from the merged fp32 checkpoint, on validation prompts of the token mix.

transformers.js: `pipeline("text-generation", "<this folder>", {{ dtype: "q8" }})`

Python: `ORTModelForCausalLM.from_pretrained("<this folder>", file_name="model_quantized.onnx")`

Answer greedily, without a repetition penalty: that is how it was measured.
`manifest.json` says what every file was made from.
"""
WEIGHTS_OF = {"base": "student", "adapter": "distill", "merged": "merge"}


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
        chain: the manifest of every stage so far, by stage name.

    Raises:
        ArtifactError: a folder of that name is there that edgedistill did not make.
        StorageError: no space or no permission.
    """
    folder = out / f"{recipe.name}-{target.name}"
    identity = _identity(recipe, target, report, quantized, student)

    def fill(making: Path) -> None:
        _fill(making, recipe, target, report, quantized, exported, student, chain, progress)

    facts = {"model": quantized.model.name, "format": quantized.format}
    return _publish(folder, identity, facts, chain, fill, progress)


def _publish(
    folder: Path,
    identity: Identity,
    facts: Json,
    chain: Mapping[str, Json],
    fill: Callable[[Path], None],
    progress: Progress,
) -> Bundle:
    """Reuse the bundle in `folder` when it is the same and whole, else make it by `fill`."""
    found = _whole(folder)
    reused = found is not None and found.manifest.get("key") == identity.key
    progress.stage(STAGE, folder, reused=reused)
    if found is not None and reused:
        return Bundle(folder, found.digest, folder / found.facts["model"])
    _refuse_foreign(folder)
    started = time.time()
    making = folder.with_name(f".{folder.name}.making")
    with storing(folder):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        with PeakMemory() as memory:
            fill(making)
            sync_files(making)
        manifest = manifest_of(identity, making, facts, started, memory) | {
            "made_by": f"edgedistill {__version__}",
            "provenance": {name: reduced(manifest) for name, manifest in chain.items()},
        }
        write_json(making / MANIFEST, manifest)
        _swap(making, folder, progress)
    progress.finished(STAGE, manifest["wall_seconds"], memory.own_bytes)
    return Bundle(folder, manifest["digest"], folder / facts["model"])


def pack_optimum(
    recipe: Recipe,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
    out: Path,
    progress: Progress,
) -> Bundle:
    """Make `out/<recipe>-optimum/`, the export in optimum's layout, or reuse it as `pack` does.

    Args:
        chain: the manifest of every stage so far; it holds "export-optimum" and "verify-optimum".

    Raises:
        ArtifactError: a folder of that name is there that edgedistill did not make.
        StorageError: no space or no permission.
    """
    files = chain["export-optimum"]["facts"]["files"]
    checked = chain["verify-optimum"]
    identity = Identity(
        stage=STAGE,
        version=1,
        spec={"layout": "optimum", "recipe": recipe.name, "description": recipe.description},
        inputs={"exported": exported.digest, "checked": checked["key"], "student": student.digest},
        tools={"edgedistill": __version__},
    )
    readme = OPTIMUM_README.format(
        name=recipe.name,
        base=student.name,
        licence=student.licence,
        description=recipe.description,
        table=_optimum_table(files, checked["facts"]["kld"]),
    )

    def fill(making: Path) -> None:
        names = (name for name in chain["export-optimum"]["outputs"])
        for name in names:
            (making / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(exported.folder / name, making / name)
        write_atomic(making / "README.md", readme.encode())

    facts = {"model": exported.model.relative_to(exported.folder).as_posix(), "format": "ONNX"}
    return _publish(out / f"{recipe.name}-optimum", identity, facts, chain, fill, progress)


def _optimum_table(files: Json, kld: Json) -> str:
    lines = ["| dtype | file | MB | mean KLD | p99 KLD | same top token |", "|---" * 6 + "|"]
    for dtype, file in files.items():
        own = kld[dtype]
        lines.append(
            f"| {dtype} | `onnx/{file['file']}` | {file['bytes'] / 1e6:.1f} "
            f"| {own['mean_kld']:.2g} | {own['p99_kld']:.2g} | {own['top1']:.1%} |"
        )
    return "\n".join(lines)


def _identity(
    recipe: Recipe, target: Target, report: Report, quantized: Quantized, student: Student
) -> Identity:
    shown = {"name", "description", "language", "data_licence", "teacher", "student", "distill"}
    return Identity(
        stage=STAGE,
        version=1,
        spec={
            "recipe": _without_folders(recipe.model_dump(mode="json", include=shown)),
            "target": target.model_dump(
                mode="json", include={"name", "description", "context_tokens"}
            ),
        },
        inputs={"report": report.digest, "quantized": quantized.digest, "student": student.digest},
        tools={"edgedistill": __version__, **_runtime(target)},
    )


def _runtime(target: Target) -> dict[str, str]:
    """What of other projects a bundle holds besides the model."""
    return {WLLAMA.name: WLLAMA.version} if target.runtime == "wllama" else {}


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """Weights given as a path by their file name only: where they lie changes nothing."""
    return {
        name: {**part, "weights": Path(part["weights"]).name}
        if isinstance(part, dict) and "weights" in part
        else part
        for name, part in recipe.items()
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

    figures = json.loads(report.file.read_text("utf-8"))
    provenance = _provenance(recipe, quantized, exported, student, chain)
    card = Card(recipe, target, student, figures, provenance)
    texts = {
        "report.html": render_html(figures, provenance),
        "MODEL_CARD.md": card.model_card(),
        "README.md": card.readme(),
        "Modelfile": card.modelfile(),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    # Copies, not links: users edit a bundle, and the workspace must not change with it.
    shutil.copyfile(quantized.model, folder / quantized.model.name)
    for path in (report.file, report.folder / "fidelity.json"):
        shutil.copyfile(path, folder / path.name)
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
    mark = f"<!-- {digest_of(provenance)} -->\n"
    if page.is_file() and page.read_text("utf-8").endswith(mark):
        return page
    from edgedistill.report import render_html

    figures = json.loads(report.file.read_text("utf-8"))
    write_atomic(page, (render_html(figures, provenance) + mark).encode())
    return page


def _provenance(
    recipe: Recipe,
    quantized: Quantized,
    exported: Exported,
    student: Student,
    chain: Mapping[str, Json],
) -> dict[str, Any]:
    from edgedistill.report.card import prompt_template

    return {
        "edgedistill": __version__,
        "teacher": _teacher(recipe),
        "student": {"base": student.name, "licence": student.licence, "source": student.source},
        "data": _data(recipe, chain),
        "prompt_template": prompt_template(student, recipe.student),
        "sizes": _sizes(exported, quantized, chain),
        "stages": {name: reduced(manifest) for name, manifest in chain.items()},
    }


def _teacher(recipe: Recipe) -> dict[str, str]:
    teacher = recipe.teacher
    shown = {"model": teacher.model, "licence": teacher.licence, "kind": teacher.kind}
    if teacher.prompt_version is not None:
        shown["prompt_version"] = teacher.prompt_version
    return shown


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
        for model, stage in WEIGHTS_OF.items()
        if stage in chain
    }
    sizes["exported"] = exported.model.stat().st_size
    sizes["quantized"] = quantized.model.stat().st_size
    return sizes


def reduced(manifest: Json) -> dict[str, Any]:
    """A stage's manifest without its files and facts, and with the seed its spec holds."""
    kept = {name: manifest[name] for name in KEPT if name in manifest}
    return kept | {"seed": _seed(manifest["spec"])}


def _seed(spec: Any) -> int | None:
    if not isinstance(spec, Mapping):
        return None
    if isinstance(spec.get("seed"), int):
        return int(spec["seed"])
    return next((seed for inner in spec.values() if (seed := _seed(inner)) is not None), None)


def _whole(folder: Path) -> Finished | None:
    """The bundle in `folder` when every file has its size, else None: it is made again."""
    try:
        return load_finished(folder, reused=True)
    except ArtifactError:
        return None


def _listed(folder: Path) -> dict[str, Any] | None:
    """Files of the bundle in `folder` by its manifest; None when there is no bundle."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return dict(manifest["outputs"]) if manifest["stage"] == STAGE else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or _listed(folder) is not None:
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ArtifactError(
            "the bundle belongs here, but something else is here already",
            where=str(folder),
            hint="move it away, or choose another place for bundles",
        )


def _swap(making: Path, folder: Path, progress: Progress) -> None:
    """Put the new bundle in place; an old one that its user changed is kept beside it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        changed = _changed(folder)
        if changed:
            old = _free_name(folder)
            progress.note(f"{folder.name} had been changed ({changed[0]}); kept as {old.name}")
        os.replace(folder, old)
        os.replace(making, folder)
        if not changed:
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(making, folder)


def _changed(folder: Path) -> list[str]:
    """Files below `folder` that are not as the manifest lists them, or not in it."""
    listed = _listed(folder) or {}
    present = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    present.pop(MANIFEST, None)
    return [
        name
        for name, path in sorted(present.items())
        if name not in listed or digest_of_file(path) != listed[name]["sha256"]
    ]


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.changed-{i}") for i in range(1, 10_000))
    return next(name for name in names if not name.exists())
