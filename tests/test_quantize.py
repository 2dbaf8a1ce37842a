from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf import GGUFReader

from edgedistill.artifacts import (
    Allocation,
    Checkpoint,
    Dataset,
    Exported,
    Quantized,
    Variant,
)
from edgedistill.bench.models import DeviceRuns
from edgedistill.check_specs import TextCheck
from edgedistill.errors import DatasetError, GateFailed
from edgedistill.export import export
from edgedistill.fidelity import read_rows, rows_that_fit, shuffled
from edgedistill.footprint import Shape, run_time_bytes
from edgedistill.progress import Silent, SilentTask, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.quantize import exam, quantize
from edgedistill.quantize.bounds import CANDIDATES, broken_bounds
from edgedistill.recipe import StudentSpec
from edgedistill.results import Candidate, told_apart
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import asked_ids
from edgedistill.target import Target, TargetGates
from edgedistill.tensors import matrices, read_layout
from edgedistill.torch_runtime import load_model
from edgedistill.training.data import collate, training_rows
from edgedistill.training.loss import supervised_logits
from edgedistill.trim import kept_tokens, trim

SPEC = StudentSpec(weights="tiny", max_tokens=4)
CHECK = TextCheck(kind="exact")


@dataclass
class Labels(Silent):
    """Remembers what was begun, and is interrupted where it is told to."""

    interrupt_at: str = ""
    seen: list[str] = field(default_factory=list)

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        self.seen.append(label)
        if label == self.interrupt_at:
            raise KeyboardInterrupt
        return SilentTask()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    student = tiny.tiny_student(tmp_path_factory.mktemp("student"))
    out = tmp_path_factory.mktemp("out")
    return export(Checkpoint(student.folder, "checkpoint"), student, "recipe", out, Silent())


@pytest.fixture(scope="module")
def dataset(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Its answers are the exported model's own, so its agreement is 1."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = read_rows(tiny.tiny_dataset(folder, 6).folder / "validation.jsonl")
    prompt = StudentPrompt(exported.folder, SPEC)
    with LlamaCpp(exported.model, threads=1) as model:
        made = [model.generate(prompt.prompt_ids(r.prompt), 4, prompt.stop_ids) for r in rows]
    return tiny.tiny_dataset(folder, 6, [prompt.decode(g.ids).strip() for g in made])


def target(*formats: str, budget_mb: float = 100, **gates: Any) -> Target:
    return Target(
        name="small",
        description="a small device",
        device_class="board",
        runtime="llama.cpp",
        formats=formats,
        latency="measured",
        threads=1,
        context_tokens=256,
        memory_budget_mb=budget_mb,
        gates=TargetGates(**{"max_agreement_drop": 1.0, **gates}),
    )


@pytest.fixture(scope="module")
def run(exported: Exported, dataset: Dataset) -> Callable[..., Quantized]:
    def run(
        target: Target, out: Path, progress: Silent | None = None, *variants: Variant
    ) -> Quantized:
        listener = progress or Silent()
        return quantize(exported, variants, None, dataset, SPEC, CHECK, target, out, listener)

    return run


@pytest.fixture(scope="module")
def made(run: Callable[..., Quantized], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return run(target("Q8_0", "Q4_0", "F16"), tmp_path_factory.mktemp("made"))


def table(folder: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((folder / CANDIDATES).read_text("utf-8"))
    return {entry["format"]: entry for entry in entries}


def test_the_smallest_that_passes_wins(made: Quantized, exported: Exported) -> None:
    found = table(made.folder)
    assert made.format == "Q4_0"
    assert made.model.name == "Tiny-2M-Instruct-recipe-v1.0-Q4_0.gguf"
    assert list(found) == ["Q8_0", "Q4_0", "F16"]
    assert [entry["chosen"] for entry in found.values()] == [False, True, False]
    assert found["Q4_0"]["bytes"] == made.model.stat().st_size
    assert 0 < found["Q8_0"]["mean_kld"] < found["Q4_0"]["mean_kld"] < 5
    assert found["Q8_0"]["p99_kld"] > found["Q8_0"]["mean_kld"]
    assert 4.5 < found["Q4_0"]["bits_per_weight"] < 5
    assert (found["F16"]["mean_kld"], found["F16"]["top1"]) == (0, 1)
    assert found["F16"]["agreement"] == found["F16"]["agreement_before"] == 1
    assert found["F16"]["bytes"] == exported.model.stat().st_size
    names = {path.name for path in made.folder.iterdir()}
    assert names == {"manifest.json", CANDIDATES, made.model.name}
    with LlamaCpp(made.model, threads=1) as model:
        assert "Q4_0" in model.facts["description"]


def test_a_student_whose_tokenizer_adds_a_bos(tmp_path: Path) -> None:
    student = tiny.tiny_student(tmp_path / "student", adds_bos=True)
    exported = export(Checkpoint(student.folder, "c"), student, "recipe", tmp_path, Silent())
    data, device = tiny.tiny_dataset(tmp_path / "data"), target("Q8_0", max_mean_kld=0.01)
    made = quantize(exported, (), None, data, SPEC, CHECK, device, tmp_path, Silent())
    rows, prompt = read_rows(data.folder / "validation.jsonl"), StudentPrompt(exported.folder, SPEC)
    with LlamaCpp(made.model, threads=1) as model:
        assert model.facts["add_bos"]
        text = prompt.render(rows[0].prompt)
        assert asked_ids(model, text) == prompt.prompt_ids(rows[0].prompt)
        assert asked_ids(model, text) == [model.facts["bos"], *model.tokenize(text)]
        own = model.generate(prompt.prompt_ids(rows[0].prompt), 4, prompt.stop_ids)
        answers = DeviceRuns(model, prompt, 4).answer(rows[:1], SilentTask())
    assert answers == [own.text.strip()]


def test_a_gate_makes_a_larger_file_win(run: Callable[..., Quantized], tmp_path: Path) -> None:
    made = run(target("Q2_K", "F16", max_agreement_drop=0.5), tmp_path)
    assert made.format == "F16"
    assert "agreement drop 1 > 0.5" in table(made.folder)["Q2_K"]["why_not"]
    assert made.model.name.endswith("-F16.gguf")


def test_a_refused_candidate_does_not_win(
    made: Quantized, exported: Exported, dataset: Dataset
) -> None:
    assert made.others == 2
    out, device = made.folder.parent, target("Q8_0", "Q4_0", "F16")

    def again(*names: str) -> Quantized:
        refused = dict.fromkeys(names, "too far off")
        return quantize(
            exported, (), None, dataset, SPEC, CHECK, device, out, Silent(), refused
        )  # fmt: skip

    found = again("Q4_0")
    assert (found.format, found.others, found.digest == made.digest) == ("Q8_0", 1, False)
    assert table(found.folder)["Q4_0"]["why_not"] == "held-out prompts: too far off"
    with pytest.raises(GateFailed, match="F16: held-out prompts: too far off"):
        again("Q4_0", "Q8_0", "F16")


def test_when_none_passes_everything_is_left(run: Callable[..., Quantized], tmp_path: Path) -> None:
    with pytest.raises(GateFailed) as failure:
        run(target("Q8_0", "Q4_0", budget_mb=1.5, max_file_mb=1), tmp_path)
    assert (failure.value.step, failure.value.exit_code) == ("quantize", 3)
    text = str(failure.value)
    assert "Q8_0: file 1.34 MB > 1 MB; memory 2.4 MB > 1.5 MB" in text
    assert "Q4_0: memory 1.8 MB > 1.5 MB" in text
    assert "closest is Q4_0" in text
    (folder,) = tmp_path.glob("quantize-*")
    found = table(folder)
    assert found["Q8_0"]["mean_kld"] > 0
    assert not any(entry["chosen"] or entry["passed"] for entry in found.values())
    assert len(list(tmp_path.glob("candidate-*/*.gguf"))) == 2


def test_a_killed_run_goes_on_where_it_was(
    run: Callable[..., Quantized], made: Quantized, tmp_path: Path
) -> None:
    formats = ("Q8_0", "Q4_0", "F16")
    killed, again = Labels(interrupt_at="make Q4_0"), Labels()
    with pytest.raises(KeyboardInterrupt):
        run(target(*formats), tmp_path, killed)
    finished = run(target(*formats), tmp_path, again)
    assert killed.seen == ["measure exported", "make Q8_0", "measure Q8_0", "make Q4_0"]
    assert again.seen == ["make Q4_0", "measure Q4_0", "make F16", "measure F16"]
    assert finished.digest == made.digest


def test_a_file_is_kept_when_its_measuring_is_killed(
    run: Callable[..., Quantized], tmp_path: Path
) -> None:
    again = Labels()
    with pytest.raises(KeyboardInterrupt):
        run(target("Q8_0"), tmp_path, Labels(interrupt_at="measure Q8_0"))
    run(target("Q8_0"), tmp_path, again)
    assert again.seen == ["measure Q8_0"]


def test_targets_share_candidates(run: Callable[..., Quantized], made: Quantized) -> None:
    labels = Labels()
    other = target("Q4_0", "Q8_0", budget_mb=50)
    assert run(other, made.folder.parent, labels).digest != made.digest
    assert labels.seen == []


@pytest.fixture
def variant(exported: Exported, tmp_path: Path) -> Variant:
    """Every matrix in Q4_1, but for the embedding."""
    names = [f"blk.{i}.{part}.weight" for i in (0, 1) for part in MATRICES]
    types = dict.fromkeys(names, "Q4_1") | {"token_embd.weight": "Q6_K"}
    allocation = Allocation(tmp_path, "allocation", types, None)
    checkpoint = Checkpoint(exported.folder, "checkpoint")
    return Variant("mine", checkpoint, None, allocation, exported, False, None)


MATRICES = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()


def test_an_allocation_is_a_candidate(
    run: Callable[..., Quantized], variant: Variant, tmp_path: Path
) -> None:
    made = run(target("F16"), tmp_path, None, variant)
    assert (made.format, list(table(made.folder))) == ("mine", ["F16", "mine"])
    assert made.model.name == "Tiny-2M-Instruct-recipe-v1.0-mine.gguf"
    held = {t.name: t.tensor_type.name for t in GGUFReader(made.model).tensors}
    assert {name: held[name] for name in variant.allocation.types} == variant.allocation.types
    with LlamaCpp(made.model, threads=1) as model:
        assert "Q4_1" in model.facts["description"]  # the commonest


def test_a_fitted_file_is_held_to_the_teachers_text_and_not_to_kld(
    run: Callable[..., Quantized], variant: Variant, tmp_path: Path
) -> None:
    fitted = replace(variant, fitted=True)
    tight = {"max_mean_kld": 1e-9, "max_p99_kld": 1e-9}
    found = table(run(target("F16", **tight, max_nll_rise=9.0), tmp_path, None, fitted).folder)
    assert found["mine"]["passed"]
    assert found["mine"]["nll"] != found["mine"]["nll_before"] == found["F16"]["nll"]


def test_the_same_file_is_judged_anew_where_it_is_no_longer_called_fitted(
    run: Callable[..., Quantized], variant: Variant, tmp_path: Path
) -> None:
    tight = target("F16", max_mean_kld=1e-9, max_nll_rise=9.0)
    fitted, plain = (
        table(run(tight, tmp_path, None, replace(variant, fitted=fitted)).folder)["mine"]
        for fitted in (True, False)
    )
    assert fitted["passed"]
    assert "mean KLD" in plain["why_not"]


def test_a_speed_gate_belongs_to_bench(run: Callable[..., Quantized], made: Quantized) -> None:
    faster = target("Q8_0", "Q4_0", "F16", min_tokens_per_second=10.0)
    assert run(faster, made.folder.parent).folder == made.folder


CANDIDATE = Candidate(
    format="Q4_0",
    bytes=90_000_000,
    bits_per_weight=4.5,
    mean_kld=0.02,
    p99_kld=0.5,
    top1=0.98,
    agreement=0.87,
    agreement_before=0.89,
    estimated_memory_bytes=200_000_000,
    passed=False,
    why_not="",
    chosen=False,
)


@pytest.mark.parametrize(
    ("given", "broken"),
    [
        ({"budget_mb": 200.0, "max_file_mb": 90.0, "max_agreement_drop": 0.02}, []),
        ({"budget_mb": 199.9}, ["memory 200 MB > 199.9 MB"]),
        ({"budget_mb": 0.5}, ["memory 200 MB > 0.5 MB"]),
        ({"budget_mb": 200.0, "max_file_mb": 89.98}, ["file 90 MB > 89.98 MB"]),
        ({"budget_mb": 300.0, "max_mean_kld": 0.01}, ["mean KLD 0.02 > 0.01"]),
        ({"budget_mb": 300.0, "max_p99_kld": 0.1}, ["p99 KLD 0.5 > 0.1"]),
        ({"budget_mb": 300.0, "max_agreement_drop": 0.01}, ["agreement drop 0.02 > 0.01"]),
    ],
)
def test_bounds(given: dict[str, float], broken: list[str]) -> None:
    assert [bound.text for bound in broken_bounds(CANDIDATE, target("Q4_0", **given))] == broken


@pytest.mark.parametrize(
    ("measured", "bound", "shown"),
    [
        (1000.4, 1000.0, ("1000.4", "1000")),
        (1000.4, 500.0, ("1000", "500")),
        (92.04, 92.0, ("92.04", "92")),
        (0.04545454, 0.02, ("0.0455", "0.02")),
        (1e-9, 1e-12, ("1e-09", "1e-12")),
        (float("nan"), 1.0, ("nan", "1")),
    ],
)
def test_a_figure_and_its_bound_are_told_apart(
    measured: float, bound: float, shown: tuple[str, str]
) -> None:
    assert told_apart(measured, bound) == shown


def test_a_fitted_candidate_is_held_to_its_likelihood() -> None:
    fitted = replace(CANDIDATE, fitted=True, nll=0.5, nll_before=0.25)
    gates = {"budget_mb": 300.0, "max_mean_kld": 1e-9, "max_p99_kld": 1e-9}
    assert not broken_bounds(fitted, target("Q4_0", **gates, max_nll_rise=0.25))
    (broken,) = broken_bounds(fitted, target("Q4_0", **gates, max_nll_rise=0.2))
    assert broken.text == "NLL rise 0.25 > 0.2"


def test_no_figure_passes_by_being_absent() -> None:
    odd = replace(CANDIDATE, mean_kld=float("nan"))
    assert broken_bounds(odd, target("Q4_0", budget_mb=300.0, max_mean_kld=1.0))


def test_no_validation_rows(exported: Exported, tmp_path: Path) -> None:
    empty = tiny.tiny_dataset(tmp_path / "dataset", 0)
    with pytest.raises(DatasetError, match="no validation rows"):
        quantize(exported, (), None, empty, SPEC, CHECK, target("Q4_0"), tmp_path, Silent())


@pytest.mark.parametrize(
    ("shape", "context", "cache_mib", "buffers_mib"),
    [
        (Shape(30, 3, 64, 576, 49152, 0), 1024, 22.5, 98.25),
        (Shape(30, 3, 64, 576, 49152, 0), 256, 5.625, 49.125),
        (Shape(28, 2, 128, 1536, 151936, 0), 4096, 112.0, 302.75),
    ],
)
def test_memory_is_what_llama_cpp_reports(
    shape: Shape, context: int, cache_mib: float, buffers_mib: float
) -> None:
    """SmolLM2-135M and Qwen2.5-1.5B: "KV buffer size" and "compute buffer size" of 0.3.36's log."""
    assert run_time_bytes(shape, context) == (cache_mib + buffers_mib) * 2**20


def trimmed_to(dataset: Dataset, merges: int, tmp_path: Path) -> Variant:
    """The exported student with what a training part needs of its vocabulary, in f16."""
    student = tiny.tiny_student(tmp_path / "student")
    whole = Checkpoint(student.folder, "checkpoint")
    small = trim(whole, dataset, SPEC, merges, 0, tmp_path, Silent())
    own = export(small, student, "recipe", tmp_path, Silent())
    types = dict.fromkeys(matrices(read_layout(small.folder)), "F16")
    allocation = Allocation(small.folder, "f16", types, None)
    return Variant("mine", small, small, allocation, own, False, kept_tokens(small.folder))


def test_a_trimmed_candidate_is_measured_on_the_rows_of_its_baseline(
    exported: Exported,
    dataset: Dataset,
    run: Callable[..., Quantized],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fewer tokens more rows would fit into the same scratch space."""
    trimmed = trimmed_to(dataset, 2, tmp_path)
    prompt = StudentPrompt(exported.folder, SPEC)
    rows = read_rows(dataset.folder / "validation.jsonl")
    fits = sorted(rows, key=lambda row: shuffled(row.id, 0))[: len(rows) // 2]
    tokens = sum(len(prompt.answer_ids(row.answer)) for row in fits)
    few = tokens * prompt.vocab_size * 4
    monkeypatch.setattr(exam, "rows_that_fit", lambda r, p: rows_that_fit(r, p, few))
    found = table(run(target("Q8_0"), tmp_path, None, trimmed).folder)["mine"]
    # The same predictions among the tokens that were kept: rounding to f16 alone lies between.
    assert found["mean_kld"] < 1e-4


def test_a_trimmed_candidates_likelihood_is_per_token_of_the_exported_file(
    exported: Exported, tmp_path: Path
) -> None:
    """Cut into more tokens, an answer is no likelier."""
    trained = tiny.tiny_dataset(tmp_path / "trained", 6, ["42"])
    asked = tiny.tiny_dataset(tmp_path / "asked", 6, ["using us", "42"])
    small = trimmed_to(trained, 0, tmp_path)
    made = quantize(exported, (small,), None, asked, SPEC, CHECK, target("F16"), tmp_path, Silent())
    rows = read_rows(asked.folder / "validation.jsonl")
    shown = StudentPrompt(small.checkpoint.folder, SPEC)
    batch = collate([training_rows(rows, shown, None)], shown.stop_id)
    with torch.inference_mode():
        model = load_model(small.checkpoint.folder).eval()
        logits, labels = supervised_logits(model, batch)
    before = StudentPrompt(exported.folder, SPEC)
    count = sum(len(before.answer_ids(row.answer)) for row in rows)
    assert count < len(labels)
    total = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert table(made.folder)["mine"]["nll"] == pytest.approx(total / count, rel=1e-3)
