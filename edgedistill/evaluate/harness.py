"""The boundary to EleutherAI's lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness):
its tasks, asked of a model of ours. It is loaded by `evaluate` alone, because it is an extra.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgedistill.artifacts import digest_of, digest_of_file
from edgedistill.errors import (
    ConfigError,
    DatasetError,
    EdgedistillError,
    Problem,
    UsageError,
    did_you_mean,
)
from edgedistill.evaluate.asking import Asking
from edgedistill.evaluate.evaluation import Score, TaskResult

SEED = 1234  # of the examples in a prompt: lm-eval's own default
MAX_TOKENS = 256  # of an answer, where a task does not say: lm-eval's own default
LOGGERS = ("lm_eval", "datasets", "huggingface_hub")
GUIDE = "docs/evaluate.md says how a task and its data are given as local files"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks with their data, as lm-eval holds them."""

    held: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return list(self.held["tasks"])


def version() -> str:
    return metadata.version("lm-eval")


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets tell much, and draw bars into ours: only errors get through, as ours."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    datasets.disable_progress_bars()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def load_tasks(names: Sequence[str], num_fewshot: int | None) -> Tasks:
    """Tasks by lm-eval's names, or of local YAML files, with their data. `num_fewshot` goes before
    what a task says, but not before its 0, as in lm-eval.

    Raises:
        UsageError: there is no such task, or one samples its answers or runs code.
        ConfigError: a task file is broken. DatasetError: its data cannot be had.
    """
    with quiet():
        # Its own tasks are thousands of files: they are only read where one of them is asked for.
        manager = TaskManager(include_defaults=not all(map(is_file, names)))
        for name in names:
            if not is_file(name) and name not in manager.task_index:
                guess = did_you_mean(name, manager.all_tasks, 0.7)
                hint = "lm-eval's tasks by name, files ending in .yaml, or humaneval:FILE.jsonl"
                raise UsageError(f"{name!r} is no task", hint=f"{guess}\n  {hint}".strip())
        made = [_loaded(manager, name) for name in names]
    try:
        held = manager.load([each for some in made for each in some])
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name, task in held["tasks"].items():
        _require_usable(name, task)
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return Tasks(held)


def is_file(name: str) -> bool:
    """Whether it names a task file, and not one of lm-eval's tasks."""
    return name.lower().endswith((".yaml", ".yml"))


def _loaded(manager: TaskManager, name: str) -> list[Any]:
    try:
        spec = _with_data_beside(Path(name)) if is_file(name) else name
        built = manager.load([spec])
    except EdgedistillError:
        raise
    except Exception as error:  # whatever yaml, jinja, datasets or a task's own code throws
        _refuse(name, error)
    groups = built["groups"]
    return [groups[name]] if name in groups else list(built["tasks"].values())


def _with_data_beside(file: Path) -> dict[str, Any]:
    """A task file's fields; the paths of its data are taken from where it lies."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise UsageError("there is no such task file", where=str(file))
    fields = load_yaml(file)
    if not isinstance(fields.get("task"), str):
        raise ConfigError([Problem(str(file), 0, "task", "a task file names one task here")])
    kwargs = fields.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        kwargs["data_files"] = _beside(file.parent, kwargs["data_files"], str(file))
    return {key: value for key, value in fields.items() if key not in ("tag", "task_list")}


def _beside(folder: Path, value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {name: _beside(folder, each, where) for name, each in value.items()}
    if isinstance(value, list):
        return [_beside(folder, each, where) for each in value]
    if "://" in str(value):
        return value
    found = folder / str(value)
    if not found.is_file():
        raise DatasetError(
            f"its data is not there: {found}",
            where=where,
            hint="data_files are looked for from the folder of the task file",
        )
    return str(found.resolve())


def _refuse(name: str, error: Exception) -> NoReturn:
    """What went wrong while a task was loaded, as an error of ours."""
    kind, said = type(error), " ".join(str(error).split())[:400]
    cause = error.__cause__ or error.__context__ or error
    if "code_eval" in said or "HF_ALLOW_CODE_EVAL" in said:
        _refuse_code(name)
    if kind.__name__ == "DatasetGenerationError":
        raise DatasetError(
            f"its data cannot be read: {' '.join(str(cause).split())[:400]}",
            where=name,
            hint="each line of a JSONL file is one JSON object, all with the same fields",
        ) from error
    if kind.__module__.startswith("yaml"):
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 0
        message = getattr(error, "problem", None) or said
        raise ConfigError([Problem(name, line, "", f"this is no YAML: {message}")]) from error
    module = kind.__module__.split(".")[0]
    network = ("datasets", "huggingface_hub", "httpx2", "httpx", "requests", "fsspec", "aiohttp")
    if module in network or isinstance(error, ConnectionError | FileNotFoundError | OSError):
        why = f"{said} ({type(cause).__name__}: {cause})" if cause is not error else said
        raise DatasetError(
            f"the data of this task cannot be had: {' '.join(why.split())[:500]}",
            where=name,
            hint="without a network only data in Hugging Face's cache (HF_HOME), or local data, "
            f"can be used;\n  {GUIDE}",
        ) from error
    raise ConfigError(
        [Problem(name, 0, "", f"this task cannot be used: {kind.__name__}: {said}")], hint=GUIDE
    ) from error


def _refuse_code(name: str) -> NoReturn:
    raise UsageError(
        "this task runs what a model writes, and lm-eval would do so unguarded",
        where=name,
        hint="humaneval:FILE.jsonl runs a file of HumanEval's format in a sandbox",
    )


def _require_usable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        _refuse_code(name)
    if getattr(task, "MULTIMODAL", False):
        raise UsageError("this task shows pictures or sounds; only text is asked here", where=name)
    if task.get_config("output_type") != "generate_until":
        return
    given = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, MAX_TOKENS)
    if given["do_sample"] and given["temperature"] > 0:
        raise UsageError(
            "this task draws its answers at random, and answers here are greedy", where=name
        )


class EdgeLM(TemplateLM):  # type: ignore[misc]
    """A model of ours as lm-eval asks one. Contexts and continuations are encoded together and
    split as by lm-eval's own Hugging Face model: that part is lm-eval's."""

    def __init__(self, asking: Asking, digest: str) -> None:
        super().__init__()
        self._asking, self._digest = asking, digest

    @property
    def eot_token_id(self) -> int:
        return self._asking.model.prefix

    @property
    def prefix_token_id(self) -> int:
        return self._asking.model.prefix

    @property
    def tokenizer_name(self) -> str:
        return self._digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        model = self._asking.model
        return model.tokens(string) if add_special_tokens is False else model.encode(string)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._each(requests, lambda one: self._asking.likelihood(one[1], one[2]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._each(requests, lambda one: self._rolled(one.args[0]))

    def _rolled(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._asking.model.context_tokens - 1,
            context_len=1,
        )
        parts = map(make_disjoint_window, windows)
        return sum(self._asking.likelihood(before, part)[0] for before, part in parts)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._each(requests, lambda one: self._written(*one.args))

    def _written(self, context: str, given: Json) -> str:
        asked = normalize_gen_kwargs(dict(given), MAX_TOKENS)
        stops = [text for text in asked.get("until") or [] if text]
        return self._asking.answer(context, asked["max_gen_toks"], stops)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._asking.model.render(chat_history)

    def _each(self, requests: Sequence[Any], ask: Callable[[Any], Any]) -> list[Any]:
        found = []
        with self._asking.progress.task("asking", len(requests), "requests") as task:
            for request in requests:
                found.append(ask(request))
                task.advance()
        return found


def run_tasks(
    tasks: Tasks, asking: Asking, digest: str, *, limit: int | None, chat: bool, system: str | None
) -> list[TaskResult]:
    """Ask them of a model, and score its answers as lm-eval does; groups come before their tasks.

    Raises:
        RuntimeFailure: the model's runtime dies. UsageError: a request does not fit. ConfigError: a
            task's fields do not fit its data.
    """
    random.seed(0)
    np.random.seed(SEED)
    with quiet():
        try:
            found: Json = evaluate(
                EdgeLM(asking, digest),
                tasks.held,
                limit=limit,
                system_instruction=system,
                apply_chat_template=chat,
                bootstrap_iters=1000,
            )
        except (EdgedistillError, OSError):
            raise
        except Exception as error:  # a task's own code, or fields that do not fit its rows
            _refuse(", ".join(tasks.names), error)
    single = [_result(name, tasks.held["tasks"][name], found) for name in tasks.names]
    groups = [_group(name, found) for name in found.get("groups", {})]
    return [*groups, *single]


def _result(name: str, task: Any, found: Json) -> TaskResult:
    samples = found["samples"][name]
    better = found["higher_is_better"].get(name, {})
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], {"document": sample["doc_hash"][:16]})
        suffix = _suffix(sample["filter"])
        row |= {
            f"{metric}{suffix}": float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample[metric], int | float | np.number)
        }
    return TaskResult(
        name=name,
        version=str(found["versions"].get(name)),
        config=digest_of(_plain(found["configs"][name])),
        num_fewshot=int(found["n-shot"].get(name) or 0),
        rows=[rows[at] for at in sorted(rows)],
        scores=_scores(found["results"][name], better),
    )


def _group(name: str, found: Json) -> TaskResult:
    better = found["higher_is_better"].get(name, {})
    return TaskResult(
        name=name,
        version=str(found["versions"].get(name)),
        config="",
        num_fewshot=int(found["n-shot"].get(name) or 0),
        rows=[],
        scores=_scores(found["groups"][name], better),
        members=list(found["group_subtasks"].get(name, [])),
    )


def _scores(values: Json, better: Json) -> dict[str, Score]:
    """By metric, with its filter behind it where it has one of its own."""
    scores = {}
    for key, value in values.items():
        metric, comma, filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter}")  # "N/A" where it is not known
        stderr = float(error) if isinstance(error, int | float) else None
        higher = better.get(metric) is not False
        scores[metric + _suffix(filter)] = Score(float(value), stderr, higher)
    return scores


def _suffix(filter: str) -> str:
    return "" if filter == "none" else f",{filter}"


def _plain(value: Any) -> Any:
    """A task's fields as they shape it: local data by content, and functions by their text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str) and value.endswith((".jsonl", ".json", ".csv", ".parquet")):
        file = Path(value)
        return digest_of_file(file) if file.is_file() else value
    return value if isinstance(value, str | int | float | bool | None) else repr(type(value))
