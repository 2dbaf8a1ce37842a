"""llama-bench's figures of a model file here: tokens/s of a prompt and of single tokens, behind a
context of so many tokens, and by number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import UsageError
from edgedistill.model_prompt import context_limit
from edgedistill.places import Place
from edgedistill.runtimes import Runtime

PREFILL_TOKENS, DECODE_TOKENS = 512, 128  # llama-bench's default test
Rates = dict[str, list[float]]  # by figure, tokens/s of each run


@dataclass(frozen=True)
class More:
    """What is timed beside pp512 and tg128: both behind each of `depths` (tokens, above 0), and
    both with each number of `threads`."""

    depths: Sequence[int] = ()
    threads: Sequence[int] = ()

    def steps(self, threads: int) -> list[Step]:
        """Depths with so many threads, and then each number of its own."""
        deep = [Step(f"@d{depth}", threads, depth) for depth in self.depths]
        return [*deep, *(Step(f"@t{count}", count) for count in self.threads)]


@dataclass(frozen=True)
class Step:
    """Both once more; `behind` is put behind their names."""

    behind: str
    threads: int
    depth: int = 0


def bench(model: Runtime, runs: int, depth: int = 0, behind: str = "") -> Rates:
    """pp512 and tg128 of a loaded model; `behind` is put behind their names."""
    found = model.bench(PREFILL_TOKENS, DECODE_TOKENS, runs, depth)
    return {f"pp{PREFILL_TOKENS}{behind}": found["pp"], f"tg{DECODE_TOKENS}{behind}": found["tg"]}


def bench_together(models: Sequence[Runtime], runs: int) -> list[Rates]:
    """pp512 and tg128 of models that are loaded at once: the same test of all of them, one behind
    the other, and then the other test."""
    found: list[Rates] = [{} for _ in models]
    for name, pp, tg in (("pp", PREFILL_TOKENS, 0), ("tg", 0, DECODE_TOKENS)):
        for model, rates in zip(models, found, strict=True):
            rates[f"{name}{pp + tg}"] = model.bench(pp, tg, runs)[name]
    return found


def bench_step(file: Path, step: Step, place: Place, runs: int) -> Rates:
    """In a process of its own.

    Raises:
        RuntimeFailure: the runtime refuses it, or has no memory for so deep a context.
    """
    context = step.depth + PREFILL_TOKENS
    with place.open(file, threads=step.threads, context_tokens=context) as model:
        return bench(model, runs, step.depth, step.behind)


def require_depths(file: Path, depths: Sequence[int]) -> None:
    """That the model has learnt contexts as deep.

    Raises:
        UsageError: it has not. ArtifactError: this is no sound model.
    """
    if not depths:
        return
    limit, deepest = context_limit(file), max(depths)
    if limit is not None and deepest + PREFILL_TOKENS > limit:
        most = limit - PREFILL_TOKENS
        raise UsageError(
            f"--depths {deepest}: with the {PREFILL_TOKENS} tokens that are timed behind them this "
            f"is more than the model's context of {limit} tokens",
            where=str(file),
            hint=f"give at most {most}" if most > 0 else "no depth but 0 fits",
        )


def require_cores(threads: Sequence[int], cores: int) -> None:
    """That each thread has a core: llama.cpp's threads wait for each other in a busy loop, so one
    too many is slow, and many never end.

    Raises:
        UsageError: there are fewer cores.
    """
    if max(threads, default=0) > cores:
        what = f"--threads {max(threads)}: this process may use {cores} cores"
        raise UsageError(what, hint=f"give at most {cores}")
