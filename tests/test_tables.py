"""Results as shown: what a reader must find in the tables."""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from conftest import TARGET
from rich.console import Console, RenderableType
from sample_report import missed_report, phone_report, sample_report

from edgedistill import tables
from edgedistill.pipeline import BuildResult
from edgedistill.target import Target


def shown(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(view)
    return console.export_text()


def one_target(report: object, *, reused: bool = False) -> dict[str, object]:
    manifest = {
        "stage": "quantize", "key": "0123456789abcdef", "folder": "quantize-0123456789abcdef",
        "reused": reused, "wall_seconds": 61.2, "peak_memory_bytes": 1 << 30, "digest": "d",
    }  # fmt: skip
    folder = Path("dist") / "support-sql-laptop"
    paths = {
        "folder": str(folder), "model": str(folder / "m.gguf"), "digest": "d",
        "report": str(folder / "report.html"),
    }  # fmt: skip
    target = {"target": "laptop", "stages": [manifest], "report": report, "bundle": paths}
    return {"recipe": "support-sql", "seconds": 812.0, "targets": [target]}


def test_the_final_table_of_a_build() -> None:
    report = sample_report()
    text = shown(tables.build(one_target(report.to_json())))
    for said in (
        f"support-sql on laptop: {report.model_file}, Q5_K_M, 112.1 MB",
        "87.3 % (81.7 to 92.9, n=134)",
        "export (merged to exported)",
        "1.5e-06",
        "8.8 times the teacher's",
        "quantize   61 s   1.1 GB        made",
        str(Path("dist/support-sql-laptop/report.html")),
        "total: 14 min",
    ):
        assert said in text
    assert "missed" not in text


def test_a_missed_gate_and_an_estimate_are_labelled() -> None:
    assert "missed" in shown(tables.build(one_target(missed_report().to_json())))
    phone = shown(tables.build(one_target(phone_report().to_json())))
    assert "268 tokens/s" in phone
    assert "aarch64 (quantized to emulated aarch64, 24 prompts)" in " ".join(phone.split())
    assert "(roofline estimate, not measured)" in phone
    assert "times the teacher's" not in phone


def test_a_stage_alone_shows_no_report() -> None:
    value = one_target(None, reused=True)
    text = shown(tables.build(value))
    assert "reused" in text
    assert "agreement" not in text


def test_build_value_says_what_was_made_now() -> None:
    target = Target.model_validate(yaml.safe_load(TARGET))
    manifest = {"key": "00", "wall_seconds": 1.0, "peak_memory_bytes": 5, "digest": "d", "x": 1}
    names = {"merge": "merge", "export": "export", "trim 2 of small": "trim"}
    result = BuildResult(target, {n: {**manifest, "stage": s} for n, s in names.items()})
    value = tables.build_value("tiny", [result], {"export-00", "trim-00"}, 2.0)
    stages = value["targets"][0]["stages"]
    assert [(row["stage"], row["folder"], row["reused"]) for row in stages] == [
        ("merge", "merge-00", True),
        ("export", "export-00", False),
        ("trim 2 of small", "trim-00", False),
    ]
    assert value["targets"][0]["bundle"] is None


def test_markup_in_a_description_is_text() -> None:
    row = {"name": "x", "origin": "yours", "description": "a Jetson [aarch64] board [/x]"}
    assert "a Jetson [aarch64] board [/x]" in shown(tables.recipes([row]))
    device = {**row, "runtime": "r", "formats": [], "allocations": [], "latency": "measured",
              "memory_budget_mb": 1.0}  # fmt: skip
    assert "a Jetson [aarch64] board [/x]" in shown(tables.targets([device]))


def test_markup_in_a_message_is_text() -> None:
    row = {"area": "tool", "name": "x", "state": "missing", "value": "[red]", "hint": "[build]"}
    text = shown(tables.findings([row]))
    assert "[red]" in text
    assert "[build]" in text


def test_status_names_folders_and_plan() -> None:
    folder = str(Path("ws") / "merge-00")
    held = {"folder": folder, "stage": "merge", "complete": False, "bytes": 2048,
            "age_seconds": 3.0, "recipes": []}  # fmt: skip
    plan = [["collect", "reused", "ws/collect-11"], ["curate", "would run", "ws/curate-22"]]
    value = {"workspace": "ws", "in_use": True, "traces_bytes": 1024,
             "folders": [held], "plan": plan, "problems": ["targets/a.yaml:3: odd"],
             "ends": ["gate failed at step 'fit'"]}  # fmt: skip
    text = shown(tables.status(value))
    for said in (
        "workspace: ws, a build runs",
        "merge-00",
        "unfinished",
        "2 KB",
        "no recipe here",
        "reuse",
        "start at",
        "targets/a.yaml:3",
        "the build ends",
        "gate failed at step 'fit'",
    ):
        assert said in text
