"""A bundle beside results: the figures it has, and what it cannot tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from sample_bundle import DATASET, write_bundle
from sample_report import browser_report, phone_report, sample_report
from sample_results import CHECK, first_answers, sample_result, without_prompts, write

from edgedistill.bundle_result import NOT_TIMED, TIMED, bundle_facts, read_bundle
from edgedistill.compare import compare, read_for_comparison
from edgedistill.differences import UNTOLD
from edgedistill.errors import ArtifactError
from edgedistill.model_prompt import Asked, model_facts
from edgedistill.recipe import StudentSpec
from edgedistill.report.chain_chart import SITTING, models
from edgedistill.result_file import Result

Run = Callable[..., Ran]
REPORT = sample_report()
HELD_OUT = REPORT.agreements[-1].overall.n
FINGERPRINT = REPORT.machine["fingerprint"]


def measured(dataset: str | None = DATASET, prompts: int = HELD_OUT, **changes: Any) -> Result:
    """A sitting of the machine that has built, over the held-out prompts."""
    made = sample_result(1, fingerprint=FINGERPRINT, right=first_answers(prompts), **changes)
    assert made.token_mix is not None
    return replace(made, token_mix={**made.token_mix, "dataset": dataset})


@pytest.fixture
def bundle(here: Path) -> Path:
    return write_bundle(here / "dist" / "support-sql-v1.2")


def test_it_has_the_figures_of_its_report(bundle: Path) -> None:
    found = read_bundle(bundle)
    assert found.figures["tg128"].value == REPORT.llama_bench[1].mean
    in_process = REPORT.latencies[2]
    assert found.figures["cold_start"].value == in_process.cold_start_seconds
    assert found.figures["end_to_end_p50"].value == pytest.approx(
        in_process.end_to_end.p50, rel=0.1
    )
    assert found.figures["time_to_first_token_p95"].value == in_process.time_to_first_token.p95
    assert found.likeness is not None
    assert found.likeness["agreement"]["value"] == 0.873
    assert (found.model["bytes"], found.check) == (REPORT.model_bytes, CHECK)
    assert found.notes == [TIMED]


@pytest.mark.parametrize("report", [phone_report, browser_report])
def test_what_was_not_measured_on_the_machine_is_no_figure(here: Path, report: Any) -> None:
    found = read_bundle(write_bundle(here / "b", report()))
    assert (found.figures, found.notes) == ({}, [NOT_TIMED])


def test_nothing_is_judged_that_it_does_not_tell(here: Path, bundle: Path) -> None:
    write(measured(decode=60), here / "r.json")
    named, base, _ = read_for_comparison([bundle], here / "r.json")
    found = compare(named, base)
    row = next(row for row in found.rows if row.from_bundle)
    assert row.name == "support-sql-v1.2"
    assert row.figures["tg128"]["low"] is None
    against = {name: each.verdict for name, each in row.against.items()}
    assert against.pop("bytes") != UNTOLD
    assert set(against.values()) == {UNTOLD}
    assert "does not hold its answers" in row.against["agreement"].why
    assert "one process" in row.against["tg128"].why
    assert row.best == []
    assert f"{row.name}: {TIMED}" in found.notes


def test_a_condition_on_it_cannot_be_told(run: Run, here: Path, bundle: Path) -> None:
    write(measured(), here / "r.json")
    words = ["r.json", "--baseline", str(bundle), "--fail-if", "agreement < baseline"]
    done = run("compare", *words)
    assert (done.code, "cannot be told for r" in done.out) == (1, True), done.err
    assert "does not hold its answers" in done.out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (measured("e" * 64), "they answer other prompts: 134 of held-out prompts"),
        (measured(None), "(dataset dddddddddddd)"),  # a sample, or prompts of the user's own
        (measured(prompts=HELD_OUT - 1), "they answer other prompts: 133 of"),
        (replace(measured(), check={"kind": "label"}), "their checks differ: kind"),
    ],
)
def test_other_prompts_are_refused(
    run: Run, here: Path, bundle: Path, other: Result, said: str
) -> None:
    write(other, here / "r.json")
    done = run("compare", "r.json", str(bundle))
    assert (done.code, said in done.err) == (1, True), done.err


def test_two_bundles_of_two_datasets(run: Run, here: Path, bundle: Path) -> None:
    write_bundle(here / "dist" / "other", dataset="e" * 64)
    done = run("compare", "dist")
    assert (done.code, "dataset eeeeeeeeeeee" in done.err) == (1, True), done.err


def test_of_an_older_result_it_is_not_known(here: Path, bundle: Path) -> None:
    older = sample_result(1, right=first_answers(HELD_OUT))
    write(older, here / "r.json")
    named, *_ = read_for_comparison([here / "r.json", bundle], None)
    assert any("r: its file is from before" in note for note in compare(named).notes)


def test_without_prompts_it_may_stand_beside_any(here: Path, bundle: Path) -> None:
    write(without_prompts(sample_result(1)), here / "r.json")
    named, *_ = read_for_comparison([here / "r.json", bundle], None)
    assert len(compare(named).rows) == 2


def test_a_folder_of_bundles_and_their_chains(run: Run, here: Path, bundle: Path) -> None:
    write_bundle(here / "dist" / "phone", phone_report())
    done = run("compare", "dist", "--html", "page.html", "--format", "json")
    assert done.code == 0, done.err
    chains = {row["name"]: row["chain"] for row in json.loads(done.out)["rows"]}
    assert [link["step"] for link in chains["phone"]][-1] == "aarch64"
    assert 'id="chain-660' in (here / "page.html").read_text("utf-8")


def test_a_sitting_of_its_file_ends_the_chain(here: Path, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    made = measured()
    made = replace(made, model={**made.model, "bundle": bundle_facts(bundle, manifest)})
    write(made, here / "r.json")
    named, *_ = read_for_comparison([here / "r.json", bundle], None)
    rows = compare(named).to_json()["rows"]
    assert rows[0]["on_chain"]
    assert models(rows)[-1] == SITTING
    assert models(rows[1:])[-1] == "quantized"
    assert models(rows)[:2] == ["adapter", "merged"]


def test_the_browser_is_a_link_of_its_own(here: Path) -> None:
    found = read_bundle(write_bundle(here / "b", browser_report()))
    assert found.model["bundle"]["chain"][-1]["after"] == "in a browser"


def test_a_bundle_of_before_has_no_chain(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    (bundle / "report.json").unlink()
    assert bundle_facts(bundle, {**manifest, "provenance": {}})["chain"] is None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("manifest.json", '{"stage": "pa', "manifest.json: this part of a bundle cannot be used"),
        ("manifest.json", "[]", "it holds no object"),
        ("manifest.json", '{"stage": "bench"}', "no bundle, but a folder of the stage bench"),
        (
            "report.json",
            '{"agre',
            "report.json: this part of a bundle cannot be used: it is incomplete, cut off",
        ),
        ("report.json", "{}", "it lacks 'machine'"),
    ],
)
def test_a_damaged_bundle(bundle: Path, name: str, text: str, said: str) -> None:
    (bundle / name).write_text(text, "utf-8")
    with pytest.raises(ArtifactError) as refused:
        read_bundle(bundle)
    assert said in str(refused.value)


def test_one_without_a_report(bundle: Path) -> None:
    (bundle / "report.json").unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        read_bundle(bundle)


def test_a_folder_has_the_sha256_of_its_measurement(here: Path) -> None:
    """So that a bundle and a result of its ONNX model are known to be of the same files."""
    inside = {"model.onnx": b"weights", "genai_config.json": b"{}", "deep/x.bin": b"x"}
    for name, data in inside.items():
        file = here / "dist" / "student-onnx" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    facts = model_facts(Asked(here / "dist" / "student-onnx", StudentSpec(weights="x")))
    outputs = {
        f"student-onnx/{name}": {"sha256": hashlib.sha256(data).hexdigest()}
        for name, data in inside.items()
    }
    outputs["model.onnx"] = {"sha256": "of another file"}
    bundle = write_bundle(
        here / "b", outputs=outputs, facts={"model": "student-onnx", "format": "int4"}
    )
    found = read_bundle(bundle).model
    assert (found["name"], found["sha256"]) == (facts["name"], facts["sha256"])
