"""Recipes and targets checked together: every problem of every file at once, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from edgedistill.check_specs import EmbeddingCheck, SqlExecutionCheck
from edgedistill.combine import require_plain
from edgedistill.errors import (
    ArtifactError,
    ConfigError,
    EdgedistillError,
    Problem,
    TokenMixError,
)
from edgedistill.field_help import Location
from edgedistill.gguf_header import read_header
from edgedistill.initialise import MODEL_ID, UNTOUCHED
from edgedistill.library import shown
from edgedistill.methods import LoraSpec, ProxySpec
from edgedistill.recipe import ApiTeacher, Recipe, load_recipe
from edgedistill.sizes import known_dimensions, rank_problem
from edgedistill.student_file import proxy_problem, student_problem
from edgedistill.target import Target, load_target
from edgedistill.tokenmix import read_token_mix
from edgedistill.weights import KNOWN
from edgedistill.yamlfile import dotted, load

SQLITE = b"SQLite format 3\0"  # the file format's first 16 bytes

Read = TypeVar("Read", Recipe, Target)


def validate(recipes: Sequence[Path], targets: Sequence[Path]) -> dict[str, Any]:
    """Read all files, their token mixes too, and check each recipe against each target.

    Returns what was checked: {"recipes": {name: number of prompts}, "targets": [name]}.

    Raises:
        ConfigError: every problem found, those of the token mixes included.
    """
    held, devices, problems = _read(recipes, targets)
    counts = {}
    for path in dict.fromkeys(recipes):
        prompts = _prompts(path, held.get(path))
        if prompts is None:
            continue
        try:
            count = len(read_token_mix(prompts).entries)
        except TokenMixError as error:
            problems += _about_prompts(prompts, error)
        else:
            if path in held:
                counts[held[path].name] = count
    for path, recipe in held.items():
        problems += _about_name(path, recipe.name, path.parent.name, path.parent.parent, "recipes")
        if recipe.teacher.model == MODEL_ID:
            problems.append(_problem(path, ("teacher", "model"), "; ".join(UNTOUCHED)))
    for path, target in devices.items():
        problems += _about_name(path, target.name, path.stem, path.parent, "targets")
    if problems:
        raise ConfigError(problems)
    return {"recipes": counts, "targets": [target.name for target in devices.values()]}


def _prompts(path: Path, recipe: Recipe | None) -> Path | None:
    """The prompts file, also of a recipe with other problems, so that all are told at once."""
    if recipe is not None:
        return recipe.prompts
    try:
        named = load(path, shown(path)).values.get("prompts")
    except ConfigError:
        return None
    file = path.parent / named if isinstance(named, str) else None
    return file if file is not None and file.is_file() else None


def _about_name(path: Path, name: str, place: str, folder: Path, kind: str) -> list[Problem]:
    """Two of one name would overwrite each other's bundle, so a name is that of its place."""
    if folder.name != kind or name == place:
        return []
    what = "folder" if kind == "recipes" else "file"
    said = f"is {name!r}, but its {what} is called {place!r}; make them equal"
    return [_problem(path, ("name",), said)]


def load_together(recipe: Path, targets: Sequence[Path]) -> tuple[Recipe, list[Target]]:
    """One recipe and its targets, as a build needs them.

    Raises:
        ConfigError: every problem of all the files.
    """
    recipes, devices = load_all([recipe], targets)
    return recipes[0], devices


def load_all(recipes: Sequence[Path], targets: Sequence[Path]) -> tuple[list[Recipe], list[Target]]:
    """Recipes and targets, in the order given, each once.

    Raises:
        ConfigError: every problem of all the files.
    """
    held, devices, problems = _read(recipes, targets)
    if problems:
        raise ConfigError(problems)
    return list(held.values()), list(devices.values())


def load_valid(
    recipes: Sequence[Path], targets: Sequence[Path]
) -> tuple[list[Recipe], list[Target], list[Problem]]:
    """Recipes and targets without a problem of their own, and every problem of all the files."""
    held, devices, problems = _read(recipes, targets)
    sound = [recipe for path, recipe in held.items() if not _about_recipe(path, recipe)]
    return sound, list(devices.values()), problems


def _read(
    recipes: Sequence[Path], targets: Sequence[Path]
) -> tuple[dict[Path, Recipe], dict[Path, Target], list[Problem]]:
    problems: list[Problem] = []
    held = _each(load_recipe, recipes, problems)
    devices = _each(load_target, targets, problems)
    for path, recipe in held.items():
        problems += _about_recipe(path, recipe)
    for path, target in devices.items():
        problems += _about_target(path, target)
    for path, recipe in held.items():
        for target in devices.values():
            problems += _about_pair(path, recipe, target)
    return held, devices, problems


def _each(
    reader: Callable[[Path, str], Read], paths: Sequence[Path], problems: list[Problem]
) -> dict[Path, Read]:
    found = {}
    for path in dict.fromkeys(paths):
        try:
            found[path] = reader(path, shown(path))
        except ConfigError as error:
            problems.extend(error.problems)
    return found


def _about_recipe(path: Path, recipe: Recipe) -> list[Problem]:
    problems = [*_about_rank(path, recipe), *_about_added(path, recipe)]
    if wrong := student_problem(recipe.student):
        problems.append(_problem(path, ("student", wrong.field), wrong.what))
    problems += _about_proxy(path, recipe.distill.proxy)
    if not isinstance(recipe.teacher, ApiTeacher):
        weights = recipe.teacher.weights
        if weights.endswith(".gguf") and (told := _about_file(Path(weights))):
            problems.append(_problem(path, ("teacher", "weights"), told))
        elif not weights.endswith(".gguf") and weights not in KNOWN:
            told = f"no pinned weights '{weights}'; known: {', '.join(KNOWN)}"
            problems.append(_problem(path, ("teacher", "weights"), told))
    if isinstance(recipe.check, SqlExecutionCheck) and (told := _about_db(recipe.check.database)):
        problems.append(_problem(path, ("check", "database"), told))
    if (
        isinstance(recipe.check, EmbeddingCheck)
        and not (recipe.check.model / "config.json").is_file()
    ):
        told = f"{recipe.check.model} is no folder of a model: it has no config.json"
        problems.append(_problem(path, ("check", "model"), told))
    return problems


def _about_proxy(path: Path, proxy: ProxySpec | None) -> Iterator[Problem]:
    """Its further prompts, too: a build reads them behind the proxy's training."""
    if proxy is None:
        return
    if told := proxy_problem(proxy.weights):
        yield _problem(path, ("distill", "proxy", "weights"), told)
    if proxy.prompts is not None:
        try:
            read_token_mix(proxy.prompts)
        except TokenMixError as error:
            yield from _about_prompts(proxy.prompts, error)


def _about_rank(path: Path, recipe: Recipe) -> Iterator[Problem]:
    """A rank above a layer's width, where the weights are here to tell."""
    spec, location = recipe.distill, ("distill", "lora", "rank")
    if spec.tuning != "full" and (wrong := _too_wide(recipe.student.weights, spec.lora)):
        yield _problem(path, location, wrong)
    if spec.proxy is not None and (wrong := _too_wide(spec.proxy.weights, spec.proxy.lora)):
        yield _problem(path, ("distill", "proxy", "lora", "rank"), wrong)


def _too_wide(weights: str, lora: LoraSpec) -> str:
    try:
        found = known_dimensions(weights)
    except EdgedistillError:
        return ""  # told at the weights
    wrong = rank_problem(lora, weights, found)
    return f"{wrong}; at most {found.narrowest}" if wrong and found else ""


def _about_added(path: Path, recipe: Recipe) -> Iterator[Problem]:
    """Adapters that cannot be added, or not to what is trained."""
    location: Location = ("merge", "adapters")
    tuning = recipe.distill.tuning
    if recipe.merge.adapters and tuning in ("dora", "full"):
        what = f"nothing can be added to what distill.tuning {tuning} makes"
        yield _problem(path, location, what)
    for added in recipe.merge.adapters:
        try:
            require_plain(added.path)
        except ArtifactError as error:
            yield _problem(path, location, f"{added.path}: {error.what}")


def _about_folder(folder: Path) -> str:
    """What is wrong with the folder of an embedding model."""
    whole = (folder / "config.json").is_file()
    return "" if whole else f"{folder} is no folder of a model: it has no config.json"


def _about_file(file: Path) -> str:
    """What is wrong with a model file that no pin vouches for; "" where nothing is."""
    if not file.is_file():
        return f"there is no file {file}"
    try:
        read_header(file)
    except ArtifactError as error:
        return f"{file}: {error.what}"
    return ""


def _about_db(file: Path) -> str:
    """What is wrong with the file of a database; an empty one is one."""
    try:
        with file.open("rb") as stream:
            begins = stream.read(len(SQLITE))
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return "" if begins in (SQLITE, b"") else f"{file} is no SQLite database"


def _about_target(path: Path, target: Target) -> list[Problem]:
    if target.latency == "roofline" and target.gates.min_tokens_per_second is not None:
        return [
            _problem(
                path,
                ("gates", "min_tokens_per_second"),
                "cannot gate a speed that is only estimated (latency: roofline)",
            )
        ]
    return []


def _about_pair(path: Path, recipe: Recipe, target: Target) -> list[Problem]:
    if recipe.student.max_tokens < target.context_tokens:
        return []
    return [
        _problem(
            path,
            ("student", "max_tokens"),
            f"{recipe.student.max_tokens} tokens of answer leave no room for a prompt in the "
            f"{target.context_tokens} tokens of context on {target.name}",
        )
    ]


def _problem(path: Path, location: Location, message: str) -> Problem:
    line = load(path, shown(path)).line(location)
    return Problem(shown(path), line, dotted(location), message)


def _about_prompts(path: Path, error: TokenMixError) -> list[Problem]:
    if error.problems:
        return [replace(problem, file=shown(path)) for problem in error.problems]
    return [Problem(shown(path), 0, "", error.what)]
