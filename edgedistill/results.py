"""The shape of `report.json`: what a build measured. Shares are 0..1, times seconds, KLD nats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A share with its 95 % bootstrap interval over `n` prompts."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Agreement:
    """Agreement with the teacher on held-out prompts: over all, and by whether the phrasing of the
    prompt occurs in the training data."""

    model: str  # base, adapter, merged, exported, trimmed, fitted, quantized
    overall: Interval
    seen: Interval | None
    unseen: Interval | None


@dataclass(frozen=True)
class Link:
    """One hand-over, measured on held-out prompts: the model after `step` against the one before.

    KLD is KL(before || after) per answer token over the full vocabulary, in fp32; `top1` is the
    share of tokens with the same most likely token.
    """

    step: str  # "merge" | "export" | "trim" | "fit" | "quantize" | "aarch64"
    before: str
    after: str
    mean_kld: float
    p99_kld: float
    max_kld: float
    top1: float
    tokens: int
    agreement_before: float
    agreement_after: float
    gates: dict[str, float]  # bound by name, e.g. {"mean_kld": 1e-4}
    passed: bool
    nll_before: float | None = None  # of the teacher's answers, nats a token
    nll_after: float | None = None
    prompts: int | None = None  # None: all held-out prompts; else the agreements are over so many


@dataclass(frozen=True)
class Candidate:
    """One quantized file, made and measured on validation prompts.

    `nll` is of the teacher's answers, in nats a token. A fitted candidate was trained on, so it
    may differ from the exported file (KLD) and still follow the teacher as well.
    """

    format: str
    bytes: int
    bits_per_weight: float
    mean_kld: float
    p99_kld: float
    top1: float
    agreement: float
    agreement_before: float
    estimated_memory_bytes: int
    passed: bool
    why_not: str  # "" when it passed
    chosen: bool
    fitted: bool = False
    nll: float | None = None
    nll_before: float | None = None
    refused: str = ""  # by held-out prompts, and why; then the next smallest was tried


@dataclass(frozen=True)
class Spread:
    """Percentiles of one figure over prompts, in seconds unless the name says otherwise."""

    p50: float
    p95: float
    p99: float
    mean: float


@dataclass(frozen=True)
class Latency:
    """One model answering the held-out prompts one at a time."""

    # "teacher" | "student" (both over HTTP, streaming) | "student in process" | "student in the
    # browser"
    who: str
    prompts: int
    time_to_first_token: Spread
    end_to_end: Spread
    tokens_per_second: Spread  # decode rate of each answer
    answer_tokens_mean: float
    cold_start_seconds: float | None  # start of the process to the first answer's end
    peak_memory_bytes: int | None
    end_to_end_seconds: list[float]  # one a prompt, for the distribution
    reused: int = 0  # timings of an earlier sitting, since an answered call is not asked again


@dataclass(frozen=True)
class LlamaBench:
    """llama-bench's convention: tokens/s after a warm-up, no tokenization, no sampling."""

    test: str  # "pp512" | "tg128"
    mean: float
    std: float
    runs: int
    threads: int


@dataclass(frozen=True)
class Estimate:
    """Roofline estimate for a device that is not at hand. Never measured."""

    tokens_per_second: float
    prefill_tokens_per_second: float
    time_to_first_token: float
    end_to_end_p50: float
    bytes_read_per_token: int
    formula: str
    sources: dict[str, str]


@dataclass(frozen=True)
class InBrowser:
    """The file that ships, in wllama in a real browser, against llama.cpp on the building machine.

    All over the same `prompts` held-out prompts. `kld` is KL(llama.cpp || wllama) per token of the
    teacher's answers over the full vocabulary, from wllama's float32 probabilities; prompts where
    one of those is not finite are counted in `overflowed` and left out, and it is None where that
    are all.
    """

    measured: bool
    why_not: str  # "" when it was measured
    runtime: str  # wllama's version and its llama.cpp build
    browser: str
    prompts: int
    misread: int  # prompts whose text or token IDs were not those of training
    same_answers: Interval | None  # answers that are llama.cpp's, letter by letter
    agreement: Interval | None  # with the teacher, in the browser
    agreement_native: Interval | None  # with the teacher, by llama.cpp
    kld: dict[str, float] | None  # mean_kld, p99_kld, max_kld, top1, tokens
    overflowed: int


@dataclass(frozen=True)
class Example:
    """One held-out prompt, side by side."""

    id: str
    prompt: str
    teacher: str
    student: str
    same: bool
    seen_phrasing: bool


@dataclass(frozen=True)
class Sample:
    """What a student in training answered to one validation prompt."""

    prompt: str
    teacher: str
    student: str
    same: bool


@dataclass(frozen=True)
class TrainingPoint:
    """One step of training; the validation figures only where they were measured.

    In nats a token: the NLL of the teacher's answers, and KL(unquantized student || this one) on
    validation prompts with altered words.
    """

    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    validation_agreement: float | None
    validation_nll: float | None = None
    validation_kld: float | None = None
    samples: Sequence[Sample | dict[str, Any]] = ()


@dataclass(frozen=True)
class Gate:
    """One bound and the figure it was held against."""

    step: str
    name: str
    bound: float
    measured: float
    passed: bool


@dataclass(frozen=True)
class BenchResult:
    """Everything measured about one recipe on one target."""

    recipe: str
    target: str
    description: str
    machine: dict[str, Any]
    check: str  # the check's kind and its normalisation, in words
    teacher_model: str
    student_base: str
    model_file: str
    model_bytes: int
    format: str
    counts: dict[str, int]  # prompts, answered, failed, rejected, train, validation, held_out
    rejected: dict[str, int]  # reason -> count
    agreements: list[Agreement]
    links: list[Link]
    candidates: list[Candidate]
    training: list[TrainingPoint]
    latency_kind: str  # "measured" | "roofline" | "browser"
    latencies: list[Latency]
    speedup_p50: float | None  # teacher's end-to-end p50 / student's, same prompts, in turn
    llama_bench: list[LlamaBench]
    estimate: Estimate | None
    examples: list[Example]
    gates: list[Gate]
    notes: list[str] = field(default_factory=list)
    in_browser: InBrowser | None = None  # only for a target whose runtime is a browser
    fitting: list[TrainingPoint] = field(default_factory=list)  # of a fitted file
    fitted_step: int | None = None  # the step whose weights it has
    trained: dict[str, Any] = field(default_factory=dict)  # facts of the training run

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def told_apart(measured: float, bound: float) -> tuple[str, str]:
    """Both as text: three digits, or as many as it takes until they differ, and no exponent where
    there are no more than six digits before the point."""
    shown = "", ""
    for digits in (3, 4, 6, 9, 17):
        shown = _digits(measured, digits), _digits(bound, digits)
        if shown[0] != shown[1]:
            break
    return shown


def _digits(value: float, digits: int) -> str:
    whole = len(f"{abs(value):.0f}")
    return f"{value:.{max(digits, whole if whole <= 6 else 0)}g}"
