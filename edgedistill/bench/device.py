"""What the device makes of a file: its own kernels, a browser, the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgedistill import emulator
from edgedistill.bench import Build, emulated
from edgedistill.bench.agreement import Answers, Same, judge
from edgedistill.bench.in_browser import Found, browse
from edgedistill.bench.models import Model, device_model
from edgedistill.bench.roofline import estimate, load_of
from edgedistill.bench.serving import Measured, Sitting, measure
from edgedistill.checks import Checker
from edgedistill.errors import EdgedistillError, MissingTool, RuntimeFailure, WeightsError
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.results import Estimate, Link
from edgedistill.runtimes import LLAMA

NOT_WORTH_IT = (
    "refused by held-out prompts while larger candidates wait: it was neither timed nor run on the "
    "device's own kernels or in a browser"
)


@dataclass(frozen=True)
class Seen:
    """What is known of the file before: its prompt (a vocabulary may be trimmed), its answers to
    the held-out rows, and which of them are the teacher's."""

    build: Build
    rows: Sequence[EvalRow]
    prompt: StudentPrompt
    context_tokens: int
    answers: Answers
    same: Same
    checker: Checker


@dataclass(frozen=True)
class OnDevice:
    """What was found; `links` and `page` only where the target asks for them."""

    links: list[Link]
    notes: list[str]
    page: Found | None
    speed: Measured
    estimate: Estimate | None = None


def untried() -> OnDevice:
    """Nothing was measured, and why."""
    return OnDevice([], [NOT_WORTH_IT], None, Measured([], None, [], []))


def on_device(seen: Seen, native: Model, out: Path, resume: Path, progress: Progress) -> OnDevice:
    """Measure all that the target asks for; `native` runs the file on this machine."""
    links, notes = _emulated(seen, resume, progress)
    page = None
    if seen.build.target.runtime == "wllama":
        page = browse(
            seen.build, seen.rows, seen.prompt, seen.context_tokens, native, seen.answers,
            seen.checker, resume, progress,
        )  # fmt: skip
    speed, guess = _speed(seen, page, out, resume, progress)
    return OnDevice(links, notes + speed.notes, page, speed, guess)


def _emulated(seen: Seen, resume: Path, progress: Progress) -> tuple[list[Link], list[str]]:
    """The link to the target's own kernels with a note on it, or a note on why there is none;
    nothing where it is not wanted."""
    build, target, spec = seen.build, seen.build.target, seen.build.recipe.bench
    child, notes = _processor(build, resume, progress)
    if child is None:
        return [], notes
    threads, tokens = emulated.threads(target), build.recipe.student.max_tokens
    here, there = (
        device_model(
            name,
            LLAMA,
            build.quantized.model,
            seen.prompt,
            tokens,
            threads=threads,
            context_tokens=seen.context_tokens,
            command=command,
            request_seconds=emulator.REQUEST_SECONDS,
        )
        for name, command in ((emulated.BEFORE, None), (emulated.AFTER, child.command))
    )
    chosen = emulated.choose(seen.rows, spec)
    found, notes = try_emulated(here, there, chosen, resume, progress)
    if found is None:
        return [], notes
    after = judge(seen.checker, chosen, found.answers)
    count = len(chosen)
    shares = sum(seen.same[row.id] for row in chosen) / count, sum(after.values()) / count
    told = (
        f"aarch64: {count} held-out prompts on the kernels for {child.processor.march}, emulated "
        f"(QEMU as {child.processor.cpu}); nothing of it was timed"
    )
    return [emulated.link(found, shares, target)], [told]


def _processor(
    build: Build, resume: Path, progress: Progress
) -> tuple[emulator.Emulator | None, list[str]]:
    """The emulator of the target's processor; or None, and a note where one is wanted."""
    target, spec = build.target, build.recipe.bench
    if not emulated.wanted(spec, target):
        return None, emulated.cannot(spec, target)
    try:
        return emulator.prepare_aarch64(target.device_class, progress), []
    except (MissingTool, WeightsError, RuntimeFailure) as error:
        # A tool, the network for llama.cpp's sources, a compiler: none is worth the whole build.
        return None, [_without_emulator(error, resume, progress)]


def try_emulated(
    here: Model, there: Model, chosen: Sequence[EvalRow], resume: Path, progress: Progress
) -> tuple[emulated.Emulated | None, list[str]]:
    """What was measured; or None and a note: an emulator that dies ends no build. `here` has
    answered every held-out prompt before."""
    try:
        return emulated.measure_emulated(here, there, chosen, resume, progress), []
    except RuntimeFailure as error:
        return None, [_without_emulator(error, resume, progress)]


def _without_emulator(error: EdgedistillError, resume: Path, progress: Progress) -> str:
    """What the report says of it; the user is told, too, how to have it tried again."""
    told = f"{emulated.NOT_MEASURED}{error.what}"
    again = "" if isinstance(error, MissingTool) else f"; remove {resume.parent} to try again"
    progress.note(told + again)
    return told


def _speed(
    seen: Seen,
    page: Found | None,
    out: Path,
    resume: Path,
    progress: Progress,
) -> tuple[Measured, Estimate | None]:
    build, rows, prompt, target = seen.build, seen.rows, seen.prompt, seen.build.target
    if target.latency == "browser" and page is not None:
        why = page.step.why_not
        return Measured(
            page.latencies, None, [], [f"speed was not measured: {why}"] * bool(why)
        ), None
    if target.roofline is not None and target.latency == "roofline":
        asked = median(len(prompt.prompt_ids(row.prompt, row.history)) for row in rows)
        answered = median(len(prompt.answer_ids(row.answer)) for row in rows)
        load = load_of(build.quantized.model)
        guess = estimate(load, target.roofline, asked, answered, target.sources)
        progress.note(f"{target.name}: speed is a roofline estimate, nothing was timed")
        return Measured([], None, [], []), guess
    # Of another part of the data, so that no answer to a timed prompt is in a server's cache.
    validation = read_rows(build.dataset.folder / "validation.jsonl")
    entries = {entry.id: entry for entry in build.mix.entries}
    sitting = Sitting(
        build.recipe,
        target,
        build.quantized,
        prompt,
        seen.context_tokens,
        rows,
        warm_up=validation[0],
        entries=entries,
    )
    return measure(sitting, out, resume, progress), None
