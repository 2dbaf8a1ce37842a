"""A realistic report.json, for tests of the report and the bundle."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from edgedistill.results import (
    Agreement,
    BenchResult,
    Candidate,
    Estimate,
    Example,
    Gate,
    InBrowser,
    Interval,
    Latency,
    Link,
    LlamaBench,
    Sample,
    Spread,
    TrainingPoint,
)


def sample_report() -> BenchResult:
    """A laptop build that passed every gate."""
    return BenchResult(
        recipe="support-sql",
        target="laptop",
        description="Turns a question about the support tickets into one SQLite query.",
        machine={
            "cpu": "x86-64 laptop CPU", "cpu_features": ["avx2", "fma", "avx512f"],
            "physical_cores": 2, "logical_cores": 4, "usable_cores": 4,
            "memory_bytes": 8_246_337_536, "os": "Linux 6.1", "architecture": "x86_64",
            "python": "3.11.2", "gpus": [], "versions": {"llama-cpp-python": "0.3.36"},
            "fingerprint": "2f6d0c51a9e4",
        },
        check="both queries are executed on the recipe's database; same rows, any order",
        teacher_model="qwen2.5-coder-1.5b-instruct",
        student_base="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_file="SmolLM2-135M-Instruct-support-sql-v1.0-Q5_K_M.gguf",
        model_bytes=112_104_448,
        format="Q5_K_M",
        counts={
            "prompts": 660, "answered": 658, "failed": 2, "rejected": 44, "train": 418,
            "validation": 62, "held_out": 134,
        },
        rejected={"invalid": 27, "duplicate": 9, "truncated": 5, "failed": 2, "empty": 1},
        agreements=[
            _agreement("base", 0.0, 0.0, 0.0),
            _agreement("adapter", 0.881, 0.94, 0.82),
            _agreement("merged", 0.881, 0.94, 0.82),
            _agreement("exported", 0.881, 0.94, 0.82),
            _agreement("quantized", 0.873, 0.925, 0.82),
        ],
        links=[
            Link("merge", "adapter", "merged", 3.1e-10, 2.2e-9, 4.5e-8, 1.0, 4212, 0.881, 0.881,
                 {"mean_kld": 1e-6}, True),
            Link("export", "merged", "exported", 1.5e-6, 2.4e-5, 1.5e-4, 1.0, 4212, 0.881, 0.881,
                 {"mean_kld": 1e-4}, True),
            Link("quantize", "exported", "quantized", 0.00749, 0.131, 1.94, 0.9943, 4212, 0.881,
                 0.873, {"mean_kld": 0.02, "agreement_drop": 0.02}, True),
        ],
        candidates=_candidates(),
        training=_training(),
        trained={
            "steps": 57, "device": "cpu", "processes": 2, "precision": "fp32",
            "tokens_per_second": 211.4, "peak_memory_bytes": 2_100_000_000,
            "gradient_checkpointing": False,
        },
        fitting=_fitting(),
        fitted_step=54,
        latency_kind="measured",
        latencies=[
            _latency("teacher", 1.28, 0.46, 23, 6.4, 1_402_000_000),
            _latency("student", 0.146, 0.031, 108, 0.62, 231_000_000),
            _latency("student in process", 0.137, 0.024, 113, 0.41, 214_000_000),
        ],
        speedup_p50=8.77,
        llama_bench=[LlamaBench("pp512", 742.3, 11.2, 5, 2), LlamaBench("tg128", 113.4, 0.8, 5, 2)],
        estimate=None,
        examples=[_example(i) for i in range(20)],
        gates=[
            Gate("distill", "merged_agreement", 0.85, 0.881, True),
            Gate("merge", "mean_kld", 1e-6, 3.1e-10, True),
            Gate("export", "mean_kld", 1e-4, 1.5e-6, True),
            Gate("quantize", "mean_kld", 0.02, 0.00749, True),
            Gate("quantize", "agreement_drop", 0.02, 0.008, True),
            Gate("quantize", "file_mb", 150.0, 112.1, True),
            Gate("quantize", "memory_mb", 1000.0, 173.1, True),
            Gate("bench", "tokens_per_second", 50.0, 113.4, True),
        ],
        notes=["bf16 was 1.5 times as fast as fp32 on this machine, so training used it"],
    )  # fmt: skip


def phone_report() -> BenchResult:
    """A target that nobody could time: every latency is an estimate."""
    sample = sample_report()
    own = Link("aarch64", "quantized", "emulated aarch64", 2.1e-4, 0.003, 0.04, 0.9987, 812, 0.917,
               0.875, {"agreement_drop": 1 / 24}, True, prompts=24)  # fmt: skip
    return replace(
        sample,
        target="phone",
        links=[*sample.links, own],
        notes=["aarch64: 24 held-out prompts on the kernels of a phone, emulated"],
        latency_kind="roofline",
        latencies=[],
        llama_bench=[],
        speedup_p50=None,
        estimate=Estimate(
            tokens_per_second=268.4,
            prefill_tokens_per_second=2220.0,
            time_to_first_token=0.021,
            end_to_end_p50=0.093,
            bytes_read_per_token=116_400_000,
            formula="tokens/s = efficiency x bandwidth / (weight bytes + KV-cache bytes a token)",
            sources={
                "roofline.bandwidth_gb_s": "product brief, LPDDR5X-4800",
                "roofline.efficiency": "share that phones reach when decoding",
            },
        ),
    )


def fitted_report() -> BenchResult:
    """As on a phone, of a fitted file: its chain goes on from the merged model."""
    report = phone_report()
    merge, export, quantize, emulated = report.links
    fit = replace(quantize, step="fit", before="merged", after="fitted")
    return replace(report, links=[merge, export, fit, replace(quantize, before="fitted"), emulated])


def browser_report(measured: bool = True) -> BenchResult:
    """A browser build, on a machine with a browser or without one."""
    page = InBrowser(
        True, "", "wllama 2.3.7 (llama.cpp b7179, one thread)", "HeadlessChrome/150", 48, 0,
        _interval(0.958, 48), _interval(0.875, 48), _interval(0.896, 48),
        {"mean_kld": 7.3e-4, "p99_kld": 0.0128, "max_kld": 0.0141, "top1": 0.999, "tokens": 1100},
        overflowed=0,
    )  # fmt: skip
    absent = InBrowser(False, "no Chromium here", "wllama 2.3.7", "", 0, 0, *[None] * 4, 0)
    return replace(
        sample_report(),
        target="browser", latency_kind="browser", speedup_p50=None, llama_bench=[],
        latencies=[_latency("student in the browser", 2.1, 0.8, 14.0, 6.0, 380_000_000)] * measured,
        in_browser=page if measured else absent,
    )  # fmt: skip


def missed_report() -> BenchResult:
    """The same build with a broken export."""
    sample = sample_report()
    broken = replace(
        sample.links[1], mean_kld=0.42, p99_kld=9.7, max_kld=14.2, top1=0.81,
        agreement_after=0.31, passed=False,
    )  # fmt: skip
    return replace(
        sample,
        links=[sample.links[0], broken, sample.links[2]],
        gates=[replace(g, measured=0.42, passed=False) if g.step == "export" else g
               for g in sample.gates],
    )  # fmt: skip


def _interval(share: float, n: int) -> Interval:
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    return Interval(share, max(0.0, share - half), min(1.0, share + half), n)


def _agreement(model: str, overall: float, seen: float, unseen: float) -> Agreement:
    return Agreement(
        model, _interval(overall, 134), _interval(seen, 67), _interval(unseen, 67)
    )  # fmt: skip


def _candidates() -> list[Candidate]:
    gate = "loses 16.1 points of agreement, 2 allowed"
    rows = [
        ("Q8_0", 144.8, 8.53, 0.0004, 0.007, 0.998, 0.887, True, ""),
        ("Q5_K_M", 112.1, 6.6, 0.0075, 0.13, 0.994, 0.871, True, ""),
        ("Q4_K_M", 105.5, 6.1, 0.0459, 0.83, 0.979, 0.726, False, gate),
        ("Q4_0", 91.7, 5.4, 0.0924, 1.71, 0.963, 0.484, False, "loses 40.3 points, 2 allowed"),
    ]
    return [
        Candidate(
            name,
            int(mb * 1e6),
            bits,
            mean,
            p99,
            top1,
            score,
            0.887,
            int((mb + 61) * 1e6),
            ok,
            why,
            name == "Q5_K_M",
        )
        for name, mb, bits, mean, p99, top1, score, ok, why in rows
    ]


def _training() -> list[TrainingPoint]:
    points = []
    for step in range(1, 79):
        loss = 0.08 + 3.1 * math.exp(-step / 9) + 0.03 * math.sin(step * 1.7)
        score = {26: 0.71, 52: 0.839, 78: 0.887}.get(step)
        point = TrainingPoint(step, step / 26, loss, 4e-4 * (1 - step / 80), score)
        said = [] if score is None else _samples(step)
        points.append(replace(point, samples=said))
    return points


def _samples(step: int) -> list[Sample]:
    wanted = "SELECT count(*) FROM tickets WHERE status = 'open'"
    given = wanted if step > 26 else "SELECT * FROM tickets <open>"
    return [Sample("How many tickets are open?", wanted, given, given == wanted)]


def _fitting() -> list[TrainingPoint]:
    points = [TrainingPoint(0, 0.0, None, None, 0.74, 0.066, 0.09)]
    for step in range(1, 55):
        seen = {18: (0.8, 0.041, 0.11), 36: (0.86, 0.024, 0.04), 54: (0.88, 0.019, 0.03)}.get(
            step, (None, None, None)
        )
        loss = 0.02 + 0.06 * math.exp(-step / 12) + 0.01 * math.sin(step * 1.7)
        points.append(TrainingPoint(step, step / 27, loss, 3e-5 * (1 - step / 55), *seen))
    return points


def _latency(who: str, p50: float, ttft: float, rate: float, cold: float, memory: int) -> Latency:
    draw = random.Random(who)
    times = sorted(p50 * math.exp(draw.gauss(0, 0.28)) for _ in range(100))
    return Latency(
        who=who,
        prompts=100,
        time_to_first_token=Spread(ttft, ttft * 1.6, ttft * 2.3, ttft * 1.1),
        end_to_end=Spread(times[50], times[95], times[99], sum(times) / 100),
        tokens_per_second=Spread(rate, rate * 1.1, rate * 1.15, rate),
        answer_tokens_mean=31.4,
        cold_start_seconds=cold,
        peak_memory_bytes=memory,
        end_to_end_seconds=times,
    )


def _example(index: int) -> Example:
    products = ("Atlas", "Nimbus", "Pulse", "Relay", "Vault")
    product = products[index % 5]
    teacher = f"SELECT COUNT(*) FROM tickets WHERE product = '{product}' AND status != 'closed'"
    same = index % 8 != 5
    student = teacher if same else teacher.replace(" AND status != 'closed'", "")
    prompt = (
        f"how many {product} tickets are still open",
        f"My manager stopped me at the coffee machine and wants one figure before lunch, nothing "
        f"else: how many tickets about {product} are not closed yet?",
    )[index % 2]
    return Example(f"sql-{index + 1:04d}", prompt, teacher, student, same, index % 2 == 0)
