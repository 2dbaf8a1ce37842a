"""Evaluate: public benchmarks on the runtime that ships.

Tasks are EleutherAI's lm-evaluation-harness's, by name or from a local file, and files of
HumanEval's format, whose programs run in a sandbox. Every answer is kept as it comes: a run that
was killed goes on, and one that ended is repeated for nothing.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgedistill import __version__, machine
from edgedistill.artifacts import digest_of_file, require_writable, tool_versions
from edgedistill.errors import MissingTool, UsageError
from edgedistill.evaluate.asking import Asking
from edgedistill.evaluate.code import (
    PREFIX,
    Exercise,
    read_completions,
    read_exercises,
    score_code,
    written,
)
from edgedistill.evaluate.evaluation import Evaluation, TaskResult
from edgedistill.evaluate.kept import Kept
from edgedistill.evaluate.models import TORCH, Model, Subject, find_subject, open_model
from edgedistill.progress import Progress
from edgedistill.runtimes import TRAITS
from edgedistill.sandbox import Limits

if TYPE_CHECKING:
    from edgedistill.evaluate.harness import Tasks

COMPLETIONS = ".jsonl"
LIMITS = Limits()
GUARDED = {"Landlock": "your files", "seccomp": "processes, signals and sockets"}  # by the kernel


@dataclass(frozen=True)
class Plan:
    """`tasks`: names of lm-eval, YAML files, and humaneval:FILE. `limit`: the first so many
    documents of each. `chat`: by the model's own chat template, with `system` at its start."""

    tasks: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    system: str | None = None
    context: int | None = None
    threads: int | None = None
    limits: Limits = field(default=LIMITS)


def evaluate(path: Path, plan: Plan, root: Path, progress: Progress) -> Evaluation:
    """Ask a model the tasks; `path` is a GGUF file, an ONNX folder, a bundle, a checkpoint folder,
    or a JSONL file of completions that were made elsewhere. Answers are kept below `root`.

    Raises:
        UsageError: there is no such task, or it cannot be asked. ConfigError: a task file is
            broken. DatasetError: a task's data cannot be had. MissingTool: lm-eval is not
            installed. ArtifactError: there is no such model. RuntimeFailure: it is damaged or dies.
    """
    files = {name: Path(name[len(PREFIX) :]) for name in plan.tasks if name.startswith(PREFIX)}
    named = [name for name in plan.tasks if name not in files]
    twice = [name for name, count in Counter(plan.tasks).items() if count > 1]
    if twice:
        raise UsageError(f"--tasks names {twice[0]} twice")
    exercises = {name: read_exercises(file)[: plan.limit] for name, file in files.items()}
    if path.suffix == COMPLETIONS:
        return _of_completions(path, plan, named, files, exercises, progress)
    subject = find_subject(path)
    require_writable(root)
    harness = _harness() if named else None
    tasks = None
    if harness is not None:
        with progress.task("reading tasks and their data", None):
            tasks = harness.load_tasks(named, plan.num_fewshot)
    with progress.task("hashing the model", None):
        facts = subject.facts()
        digest = facts["sha256"]
    with open_model(subject, plan.context, plan.threads) as model:
        with _asking(subject, digest, model, plan, root, progress) as asking:
            found = _asked(harness, tasks, asking, digest, plan)
            made = {
                name: written(each, asking, plan.chat, plan.system)
                for name, each in exercises.items()
            }
        facts["parameters"] = model.parameters
        settings = _settings(plan, harness) | {"context_tokens": model.context_tokens}
    run = [(name, files[name], exercises[name], made[name]) for name in files]
    notes = _notes(asking)
    return _evaluation(facts, _runtime(subject), settings, found, run, notes, plan, progress)


def _asked(
    harness: ModuleType | None, tasks: Tasks | None, asking: Asking, digest: str, plan: Plan
) -> list[TaskResult]:
    if harness is None:
        return []
    found: list[TaskResult] = harness.run_tasks(
        tasks, asking, digest, limit=plan.limit, chat=plan.chat, system=plan.system
    )
    return found


def _of_completions(
    path: Path,
    plan: Plan,
    named: Sequence[str],
    files: dict[str, Path],
    exercises: dict[str, list[Exercise]],
    progress: Progress,
) -> Evaluation:
    """The score of what another model has written."""
    if named or len(files) != 1:
        raise UsageError(
            "completions are scored on one file of exercises", where=str(path),
            hint=f"give --tasks {PREFIX}FILE.jsonl",
        )  # fmt: skip
    made = read_completions(path)
    (name,) = files
    model = {
        "name": path.stem, "file": path.name, "sha256": digest_of_file(path), "bytes": None,
        "parameters": None, "runtime": None, "bundle": None,
    }  # fmt: skip
    run = [(name, files[name], exercises[name], made)]
    return _evaluation(model, {"name": None}, _settings(plan, None), [], run, [], plan, progress)


def _evaluation(
    model: dict[str, Any],
    runtime: dict[str, Any],
    settings: dict[str, Any],
    found: list[TaskResult],
    run: Sequence[tuple[str, Path, list[Exercise], dict[str, list[str]]]],
    notes: list[str],
    plan: Plan,
    progress: Progress,
) -> Evaluation:
    """With the programs run that were written."""
    held: set[str] = set()
    for _, file, exercises, made in run:
        name = f"{PREFIX}{file.stem}"
        result, verdicts = score_code(name, file, exercises, made, plan.limits, progress)
        found = [*found, result]
        held.update(*(verdict.held_by for verdict in verdicts))
    if run:
        settings = settings | {"sandbox": sorted(held), "seconds": plan.limits.seconds}
        notes = [*notes, *unheld(held)]
    return Evaluation(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        edgedistill=__version__,
        model=model,
        device={"address": "local", **machine.facts(), "runtime": runtime},
        settings=settings,
        tasks=found,
        notes=notes,
    )


def unheld(held: Collection[str]) -> list[str]:
    """A note on what only Python's audit hook kept from the programs."""
    lacking = [f"{what} (no {name})" for name, what in GUARDED.items() if name.lower() not in held]
    if not lacking:
        return []
    return [
        f"{' and '.join(lacking)} were kept from programs by Python's audit hook alone, not by the "
        "system: see docs/evaluate.md"
    ]


@contextmanager
def _asking(
    subject: Subject, digest: str, model: Model, plan: Plan, root: Path, progress: Progress
) -> Iterator[Asking]:
    """Answers belong to a file, its runtime's version, and the room it has."""
    identity = {
        "model": digest,
        "runtime": _runtime(subject),
        "context": model.context_tokens,
        "threads": plan.threads or machine.threads(),
    }
    with Kept(root, identity) as kept:
        yield Asking(model, kept, progress)


def _notes(asking: Asking) -> list[str]:
    notes = []
    if asking.truncated:
        notes.append(
            f"{asking.truncated} requests were longer than the context of "
            f"{asking.model.context_tokens} tokens and lost their beginning; --context gives more"
        )
    if asking.reused:
        notes.append(f"{asking.reused} answers are of an earlier run with this model")
    return notes


def _harness() -> ModuleType:
    """The boundary to lm-eval, with what it is needed for.

    Raises:
        MissingTool: lm-eval is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; we have bars
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from edgedistill.evaluate import harness
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgedistill"):
            raise
        raise MissingTool(
            f"the package lm-eval is not installed, or not whole: {error}",
            where="--tasks",
            hint='pip install "edgedistill[evaluate]"  (about 600 MB)',
        ) from error
    return harness


def _settings(plan: Plan, harness: ModuleType | None) -> dict[str, Any]:
    return {
        "limit": plan.limit,
        "num_fewshot": plan.num_fewshot,
        "chat": plan.chat,
        "system": plan.system,
        "threads": plan.threads or machine.threads(),
        "lm_eval": None if harness is None else harness.version(),
    }


def _runtime(subject: Subject) -> dict[str, Any]:
    tools = ("torch", "transformers") if subject.kind == TORCH else TRAITS[subject.kind].tools[:1]
    return {"name": subject.kind, **tool_versions(*tools)}
