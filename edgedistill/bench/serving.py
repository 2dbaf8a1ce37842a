"""The sitting in which latency is measured: servers started, warmed up, asked in turn, stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill import machine
from edgedistill.artifacts import Quantized, TokenMixEntry, digest_of, tool_versions
from edgedistill.bench.latency import (
    Asker,
    alone,
    choose,
    in_process,
    in_turn,
    llama_bench,
    peak_memory,
    summary,
)
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import LocalTeacher, Recipe, Teacher
from edgedistill.results import Latency, LlamaBench
from edgedistill.runtime import Generation
from edgedistill.runtimes import ONNX, asked_ids, open_runtime
from edgedistill.target import Target
from edgedistill.teacher import call_for, open_endpoint, serve_teacher
from edgedistill.teacher.client import Call, Endpoint, TeacherClient
from edgedistill.teacher.local_server import SERVER_VERSION, serve
from edgedistill.teacher.traces import TraceStore

STUDENT = "student"
STUDENT_START_SECONDS = 180.0
NOT_SERVED = (
    "the student was timed in process only, behind the teacher and not in turn with it: its "
    "runtime has no server that could be asked over HTTP, so no speedup is given"
)
PREFILL_TOKENS, DECODE_TOKENS = 512, 128  # llama-bench's default test


@dataclass(frozen=True)
class Measured:
    """What one sitting gave."""

    latencies: list[Latency]
    speedup_p50: float | None
    llama_bench: list[LlamaBench]
    notes: list[str]


@dataclass(frozen=True)
class Sitting:
    """What is timed: `rows` are all held-out rows, `warm_up` is none of them, and every server of
    the student has `context_tokens`."""

    recipe: Recipe
    target: Target
    quantized: Quantized
    prompt: StudentPrompt
    context_tokens: int
    rows: Sequence[EvalRow]
    warm_up: EvalRow
    entries: Mapping[str, TokenMixEntry]

    @property
    def timed(self) -> list[EvalRow]:
        spec = self.recipe.bench
        return choose(self.rows, spec.latency_prompts, spec.seed)


@dataclass(frozen=True)
class _Served:
    """A server that answers; pid and start time only where it runs here."""

    endpoint: Endpoint
    pid: int | None
    start_seconds: float | None


def measure(sitting: Sitting, out: Path, resume: Path, progress: Progress) -> Measured:
    """Time teacher and student over HTTP in turn, then the student in process, then llama-bench.
    Of an ONNX student there is only the time in process: nothing that ships serves it.

    Teacher traces are kept in `out/traces.db` with a purpose of their own, the student's below
    `resume`, so a killed run asks no answered call again.

    Raises:
        TeacherError: the teacher cannot be used.
        RuntimeFailure: the student's runtime fails.
    """
    if sitting.target.runtime == ONNX:
        return _apart(sitting, out, progress)
    resume.mkdir(parents=True, exist_ok=True)
    with (
        TraceStore(out / "traces.db") as traces,
        TraceStore(resume / "student-traces.db") as kept,
        _teacher_server(sitting.recipe.teacher, progress) as teacher,
        _student_server(sitting) as student,
        _client(teacher, sitting) as teacher_client,
        _client(student, sitting) as student_client,
    ):
        ask_teacher = Asker("teacher", teacher_client, _teacher_call(sitting), traces)
        ask_student = Asker(STUDENT, student_client, _student_call(sitting), kept)
        http, speedup = _over_http(
            sitting, (teacher, ask_teacher), (student, ask_student), progress
        )
    embedded, bench = _embedded(sitting, progress)
    notes = _notes(ask_teacher, ask_student, len(sitting.timed))
    return Measured([*http, embedded], speedup, bench, notes)


def _apart(sitting: Sitting, out: Path, progress: Progress) -> Measured:
    """The teacher over HTTP, then the student in process."""
    rows = sitting.timed
    with (
        TraceStore(out / "traces.db") as traces,
        _teacher_server(sitting.recipe.teacher, progress) as teacher,
        _client(teacher, sitting) as client,
    ):
        asker = Asker("teacher", client, _teacher_call(sitting), traces)
        with progress.task("first answer, from a cold start", None):
            cold = _warmed(teacher, asker, sitting.warm_up, rows)
        timings = alone(asker, rows, progress)
        peak = _peak(teacher, asker, len(rows))
        http = summary(asker.who, timings, cold, peak, asker.reused)
    embedded, bench = _embedded(sitting, progress)
    notes = [*_notes(asker, None, len(rows)), NOT_SERVED]
    return Measured([http, embedded], None, bench, notes)


def _over_http(
    sitting: Sitting,
    teacher: tuple[_Served, Asker],
    student: tuple[_Served, Asker],
    progress: Progress,
) -> tuple[list[Latency], float]:
    rows = sitting.timed
    with progress.task("first answers, from a cold start", None):
        colds = [
            _warmed(server, asker, sitting.warm_up, rows) for server, asker in (teacher, student)
        ]
    pairs = in_turn(teacher[1], student[1], rows, progress)
    latencies = [
        summary(
            asker.who,
            [pair[side] for pair in pairs],
            colds[side],
            _peak(server, asker, len(rows)),
            asker.reused,
        )
        for side, (server, asker) in enumerate((teacher, student))
    ]
    return latencies, latencies[0].end_to_end.p50 / latencies[1].end_to_end.p50


def _peak(served: _Served, asker: Asker, asked: int) -> int | None:
    """None where the process is not here, or answered only the warm-up."""
    here = served.pid is not None and asker.reused < asked
    return peak_memory(served.pid) if here and served.pid is not None else None


def _warmed(served: _Served, asker: Asker, row: EvalRow, rows: Sequence[EvalRow]) -> float | None:
    """Warm a server up; seconds from its start to the end of that answer (None: it runs elsewhere).

    A remote teacher that is not asked anything more is not asked this either: it costs money.
    """
    if served.start_seconds is None:
        if any(asker.known(timed) is None for timed in rows):
            asker.warm_up(row)
        return None
    return served.start_seconds + asker.warm_up(row)


def _embedded(sitting: Sitting, progress: Progress) -> tuple[Latency, list[LlamaBench]]:
    """The student in process, and llama-bench's test, with no server running beside them."""
    target, prompt = sitting.target, sitting.prompt
    model, threads = sitting.quantized.model, target.threads or machine.threads()
    started = time.perf_counter()
    kind, context = target.runtime, sitting.context_tokens
    with open_runtime(kind, model, threads=threads, context_tokens=context) as student:

        def generate(row: EvalRow) -> Generation:
            ids = asked_ids(student, prompt.render(row.prompt, row.history))
            return student.generate(ids, sitting.recipe.student.max_tokens, prompt.stop_ids)

        generate(sitting.warm_up)
        cold = time.perf_counter() - started
        timings = in_process(generate, sitting.timed, progress)
        latency = summary("student in process", timings, cold, student.peak_memory_bytes())
    runs = sitting.recipe.bench.llama_bench_runs
    with (
        progress.task("llama-bench pp512 and tg128", None),
        open_runtime(kind, model, threads=threads, context_tokens=PREFILL_TOKENS) as fresh,
    ):
        figures = fresh.bench(PREFILL_TOKENS, DECODE_TOKENS, runs)
    return latency, llama_bench(figures, threads)


def _teacher_call(sitting: Sitting) -> Callable[[EvalRow], Call]:
    # Timings belong to a machine and to how a server runs there: with another, all is asked again.
    teacher = sitting.recipe.teacher
    served: list[object] = [machine.fingerprint()]
    if isinstance(teacher, LocalTeacher):
        runtime = tool_versions("llama-cpp-python")
        served += [teacher.threads or machine.threads(), teacher.context_tokens, runtime]
        served.append(SERVER_VERSION)
    purpose = f"bench-{digest_of(served)[:12]}"
    return lambda row: call_for(sitting.entries[row.id], teacher, purpose)


def _student_call(sitting: Sitting) -> Callable[[EvalRow], Call]:
    spec = sitting.recipe.student
    parameters = {"temperature": 0.0, "max_tokens": spec.max_tokens}
    return lambda row: Call(
        prompt_id=row.id,
        model=STUDENT,
        messages=tuple(sitting.prompt.messages(row.prompt, row.history)),
        parameters=parameters,
        prompt_version=STUDENT,
        purpose="bench",
    )


def _client(served: _Served, sitting: Sitting) -> TeacherClient:
    spec = sitting.recipe.collect
    return TeacherClient(served.endpoint, spec.timeout_seconds, spec.attempts, spec.backoff_seconds)


@contextlib.contextmanager
def _teacher_server(teacher: Teacher, progress: Progress) -> Iterator[_Served]:
    """Like `open_endpoint`, but with the process of a local teacher, which is measured."""
    if not isinstance(teacher, LocalTeacher):
        with open_endpoint(teacher, progress) as endpoint:
            yield _Served(endpoint, None, None)
        return
    with serve_teacher(teacher, progress) as server:
        yield _Served(server.endpoint, server.pid, server.start_seconds)


@contextlib.contextmanager
def _student_server(sitting: Sitting) -> Iterator[_Served]:
    target = sitting.target
    with serve(
        sitting.quantized.model,
        STUDENT,
        threads=target.threads,
        context_tokens=sitting.context_tokens,
        port=None,
        start_seconds=STUDENT_START_SECONDS,
        role=STUDENT,
    ) as server:
        yield _Served(server.endpoint, server.pid, server.start_seconds)


def _notes(teacher: Asker, student: Asker | None, count: int) -> list[str]:
    notes = []
    if teacher.reused:
        notes.append(
            f"{teacher.reused} of {count} teacher timings are from an earlier sitting on this "
            "machine: an answered call is not asked again"
        )
    failed = {**teacher.failed, **(student.failed if student is not None else {})}
    if failed:
        notes.append(
            f"{len(failed)} of {count} timed prompts were not answered and count for neither "
            f"side; the first: {next(iter(failed.values()))}"
        )
    return notes
