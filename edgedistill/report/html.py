"""Render report.json as one HTML page: no network, no scripts, no fonts but the reader's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.report.templates import css, environment
from edgedistill.report.units import NBSP, duration, label, megabytes, percent, span

Json = Mapping[str, Any]
MODELS = {
    "base": "the student as it was published, asked in the same way: without what only the "
    "teacher is told",
    "adapter": "the base with its LoRA weights beside it",
    "merged": "LoRA weights added into the base, fp32",
    "exported": "the merged weights in the format of the device's runtime, before quantization",
    "trimmed": "without the tokens and layers that the token mix hardly needs",
    "fitted": "trained on in the number formats it ships in, computed in fp32",
    "quantized": "the chosen file, as the device runs it",
}


def render_html(report: Json, provenance: Json) -> str:
    """The whole report as one HTML document.

    Args:
        report: `report.json`, the shape of `edgedistill.results.BenchResult.to_json()`.
        provenance: what it was made from, made by `edgedistill.pack`: `edgedistill` (version),
            `teacher`, `student`, `data` (each a flat mapping of text), `prompt_template` (text),
            `sizes` (bytes by model name) and `stages` (stage name: reduced manifest).
    """
    from edgedistill.report.plots import draw  # matplotlib loads only where a report is made
    from edgedistill.report.tuning import draw_tuning

    template = environment().get_template("report.html.jinja")
    return template.render(
        report=report,
        provenance=provenance,
        agreement={row["model"]: row for row in report["agreements"]},
        charts=draw(report) | draw_tuning(report),
        models=MODELS,
        machine=machine(report["machine"]),
        css=css(),
        sentence=sentence(report),
        trained=trained(report.get("trained", {})),
        samples=samples(report["training"]),
        passed=all(gate["passed"] for gate in report["gates"]),
    )


def sentence(report: Json) -> str:
    """The result in one sentence: agreement with interval, speed and size."""
    shipped = {row["model"]: row["overall"] for row in report["agreements"]}.get("quantized")
    parts = [f"A {megabytes(report['model_bytes'])} {report['format']} model"]
    if shipped is not None:
        parts.append(
            f"gives the teacher's answer on {percent(shipped['value'])} of {shipped['n']} held-out "
            f"prompts (95 % interval {span(shipped)})"
        )
    times = {row["who"]: row["end_to_end"]["p50"] for row in report["latencies"]}
    if report["estimate"] is not None:
        rate = report["estimate"]["tokens_per_second"]
        parts.append(f"and would decode about {rate:.0f} tokens/s there: an estimate, not measured")
    elif report["speedup_p50"] is not None:
        against = ""
        if {"teacher", "student"} <= times.keys():
            student, teacher = duration(times["student"]), duration(times["teacher"])
            against = f" (median {student} against {teacher})"
        parts.append(f"and answers {_faster(report['speedup_p50'])}{against}")
    return " ".join(parts) + "."


def trained(facts: Json) -> str:
    """How the training ran, in one sentence; "" where nothing is known of it."""
    if not facts.get("steps"):
        return ""
    several = f" in {facts['processes']} processes" if facts.get("processes", 1) > 1 else ""
    if not {"device", "precision", "peak_memory_bytes"} <= facts.keys():
        return ""
    where = facts.get("gpu", facts["device"])
    parts = [f"{facts['steps']} steps on {where}{several} in {facts['precision']}"]
    if facts.get("tokens_per_second"):
        parts.append(f"{facts['tokens_per_second']:.0f} tokens/s")
    memory = facts.get("gpu_peak_memory_bytes", facts["peak_memory_bytes"])
    parts.append(f"at most {memory / 1e9:.1f}{NBSP}GB of memory")
    if facts.get("gradient_checkpointing"):
        parts.append("activations computed twice to save memory (gradient checkpointing)")
    if facts.get("model_flops_utilisation"):
        parts.append(f"{percent(facts['model_flops_utilisation'])} model-FLOPs utilisation")
    return ", ".join(parts) + "."


def samples(points: Sequence[Json]) -> list[dict[str, Any]]:
    """Each sampled prompt with the answers of all evaluations: (step, answer, same)."""
    rows: dict[str, dict[str, Any]] = {}
    for point in points:
        for sample in point.get("samples", ()):
            fresh = {"prompt": sample["prompt"], "teacher": sample["teacher"], "answers": []}
            row = rows.setdefault(sample["prompt"], fresh)
            row["answers"].append((point["step"], sample["student"], sample["same"]))
    return list(rows.values())


def _faster(ratio: float) -> str:
    return f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"


def machine(facts: Json) -> dict[str, str]:
    """The machine's facts as text: bytes as GB, lists and mappings in one line, empty ones out."""
    shown = {}
    for name, value in facts.items():
        if value is None or value in ([], {}, ""):
            continue
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / 1e9:.1f}{NBSP}GB"
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        shown[label(name)] = str(value)
    return shown
