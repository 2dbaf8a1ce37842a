from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, family_student

from edgedistill.allocations import FitSpec
from edgedistill.artifacts import Allocation, Checkpoint, Dataset, Quantized, Variant
from edgedistill.check_specs import TextCheck
from edgedistill.errors import GateFailed, TrainingError
from edgedistill.export import export
from edgedistill.fidelity import read_rows
from edgedistill.fit import choose_step, fit, fitting, prove, require_memory
from edgedistill.fit.formats import quantize_dequantize
from edgedistill.fit.latent import Latent
from edgedistill.methods import DistillSpec
from edgedistill.number_formats import usable
from edgedistill.onnx_builder import build_onnx
from edgedistill.progress import Silent, SilentTask, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.quantize import weigh
from edgedistill.recipe import StudentSpec
from edgedistill.results import TrainingPoint
from edgedistill.runtime import quantize_file
from edgedistill.tensors import matrices, read_layout
from edgedistill.torch_runtime import load_model
from edgedistill.training.data import PART_TOKENS, collate, training_rows

LESSON = DistillSpec(precision="fp32")
PROMPT = StudentSpec(weights="tiny", max_tokens=8)
CHECK = TextCheck(kind="exact")
SPEC = FitSpec(
    learning_rate=2e-3,
    epochs=8,
    batch_size=4,
    perturbed_share=0.2,
    general_share=0.2,
    evaluations=4,
    min_kld=0.0,
)
ALONE = {"kl_weight": 0.0, "hidden_weight": 0.0}  # the teacher's text, and nothing beside it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny.tiny_student(tmp_path_factory.mktemp("student")).folder, "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("dataset"))


def allocation(checkpoint: Checkpoint, kind: str) -> Allocation:
    shapes = matrices(read_layout(checkpoint.folder))
    types = {name: usable(kind, columns) for name, (_, _, columns) in shapes.items()}
    return Allocation(checkpoint.folder, f"all-{kind}", types, None)


def run(
    checkpoint: Checkpoint,
    dataset: Dataset,
    out: Path,
    spec: FitSpec = SPEC,
    kind: str = "Q4_0",
    progress: Silent | None = None,
    lesson: DistillSpec | None = None,
) -> Checkpoint:
    """What was fitted, or where the start stays what holds it."""
    made = fit(
        checkpoint, checkpoint, allocation(checkpoint, kind), dataset, PROMPT,
        lesson or LESSON, spec, CHECK, out, progress or Silent(),
    )  # fmt: skip
    if made is not None:
        return made
    (folder,) = out.glob("fit-*")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["facts"]["start_stays"]
    return Checkpoint(folder, manifest["digest"])


def points(fitted: Checkpoint) -> list[dict[str, Any]]:
    found = json.loads((fitted.folder / "training.json").read_text("utf-8"))
    return [point for point in found if point["validation_nll"] is not None]


@pytest.mark.parametrize(("method", "kind"), [("full", "Q4_0"), ("lora", "Q4_0"), ("full", "Q4_K")])
def test_fitting_learns_the_teachers_text_in_its_format(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, method: str, kind: str
) -> None:
    spec = SPEC.model_copy(update={"method": method, "rank": 4, **ALONE})
    fitted = run(checkpoint, dataset, tmp_path, spec, kind)
    measured = points(fitted)
    assert measured[0]["step"] == 0
    assert measured[-1]["validation_nll"] < 0.9 * measured[0]["validation_nll"]
    names = {p.name for p in fitted.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer.gguf.json"} <= names
    assert not (fitted.folder / "resume").exists()


def test_bf16_learns_the_same_and_is_measured_in_fp32(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    whole, half = (
        points(run(checkpoint, dataset, tmp_path, lesson=DistillSpec(precision=precision)))
        for precision in ("fp32", "bf16")
    )
    assert whole[0] == half[0]
    assert whole[-1]["validation_nll"] != half[-1]["validation_nll"]
    assert half[-1]["validation_nll"] < 0.9 * half[0]["validation_nll"]


def test_the_start_wins_when_fitting_makes_it_worse(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    ruinous = SPEC.model_copy(update={"learning_rate": 0.5, "patience": 1})
    fitted = run(checkpoint, dataset, tmp_path, ruinous)
    manifest = json.loads((fitted.folder / "manifest.json").read_text("utf-8"))
    assert manifest["facts"]["chosen_step"] == 0
    # Patience: after the start, one evaluation that is no better ends it.
    assert 3 <= len(points(fitted)) < 1 + SPEC.evaluations
    same = load_model(checkpoint.folder).state_dict()
    for name, tensor in load_model(fitted.folder).state_dict().items():
        assert torch.equal(tensor, same[name])


def test_no_more_steps_than_are_allowed(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    notes = Notes()
    spec = SPEC.model_copy(update={"max_steps": 5})
    fitted = run(checkpoint, dataset, tmp_path, spec, progress=notes)
    facts = json.loads((fitted.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["steps"] == points(fitted)[-1]["step"] == 5
    assert any(re.fullmatch(r"5 of \d+ steps are done: fit.max_steps", said) for said in notes.said)
    assert FitSpec().steps == 200
    assert FitSpec(start="student").steps is None


@pytest.mark.parametrize(
    ("method", "trained", "each"), [("full", True, 24), ("full", False, 12), ("lora", True, 12)]
)
def test_what_the_system_would_kill_is_refused(
    checkpoint: Checkpoint, method: str, trained: bool, each: int
) -> None:
    spec, folder = FitSpec.model_validate({"method": method}), checkpoint.folder
    least = read_layout(folder).parameters * each
    require_memory(spec, folder, least, trained=trained)
    require_memory(spec, folder, None, trained=trained)
    with pytest.raises(TrainingError, match="of memory at least"):
        require_memory(spec, folder, least - 1, trained=trained)


@dataclass
class Notes(Silent):
    said: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_loses_nothing_is_not_trained(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, method: str
) -> None:
    notes = Notes()
    spec = SPEC.model_copy(update={"method": method, "rank": 4, "min_kld": 1e9})
    fitted = run(checkpoint, dataset, tmp_path, spec, progress=notes)
    (start,) = points(fitted)
    facts = json.loads((fitted.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert (start["step"], facts["steps"], facts["chosen_step"]) == (0, 0, 0)
    assert any("not fitted, it stays as allocated" in said for said in notes.said)
    same = load_model(checkpoint.folder).state_dict()
    for name, tensor in load_model(fitted.folder).state_dict().items():
        assert torch.equal(tensor, same[name])
    # As far as that is not closer.
    far = spec.model_copy(update={"min_kld": start["validation_kld"], "epochs": 1})
    assert len(points(run(checkpoint, dataset, tmp_path / "far", far))) > 1


@pytest.mark.parametrize("given", [ALONE, {"start": "student"}])
def test_what_is_trained_whatever_it_loses(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Where nothing is compared, and where the start is no distilled student."""
    spec = SPEC.model_copy(update={"min_kld": 1e9, "epochs": 1, **given})
    assert len(points(run(checkpoint, dataset, tmp_path, spec))) > 1


def test_a_base_student_is_what_was_fitted_even_where_it_stays(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    ruinous = {"learning_rate": 0.5, "patience": 1, "start": "student"}
    fitted = run(checkpoint, dataset, tmp_path, SPEC.model_copy(update=ruinous))
    facts = json.loads((fitted.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert (facts["chosen_step"], facts["start_stays"]) == (0, False)


@pytest.mark.parametrize(
    ("agreements", "likelihoods", "chosen"),
    [
        ((0.92, 0.84, 0.90, 0.90), (0.027, 0.039, 0.032, 0.020), 3),  # .90 is within .038 of .92
        ((0.92, 0.84), (0.027, 0.020), 0),
        ((0.80, 0.82, 0.96, 0.92), (0.020, 0.010, 0.030, 0.020), 2),
        ((0.90, 0.90), (0.02, 0.02), 0),
        ((0.94, 0.92, 0.86, 0.90, 0.94), (0.027, 0.0172, 0.027, 0.0167, 0.0173), 4),
        ((0.94, 0.92, 0.94), (0.027, 0.0172, 0.019), 1),
        ((0.94, 0.94, 0.94, 0.94), (0.02, 0.0150, 0.0156, 0.0162), 2),  # no creeping up
        ((0.80, 0.82, 0.96, 0.96), (0.020, 0.010, 0.030, 0.020), 3),
    ],
)
def test_the_last_that_is_as_good_as_any_is_chosen(
    agreements: tuple[float, ...], likelihoods: tuple[float, ...], chosen: int
) -> None:
    points = [
        TrainingPoint(i, 1.0, None, None, *found)
        for i, found in enumerate(zip(agreements, likelihoods, strict=True))
    ]
    assert choose_step(points, validation_rows=50) == chosen


@pytest.mark.parametrize(
    ("agreements", "likelihoods", "divergences", "chosen"),
    [
        # A student that loses nothing by rounding: likelier on what it has seen, worse elsewhere.
        ((0.98, 0.84, 0.98), (0.032, 0.094, 0.021), (0.001, 0.060, 0.030), 0),
        ((0.92, 0.96, 0.96), (0.022, 0.017, 0.015), (0.042, 0.034, 0.028), 2),
        ((0.92, 0.96, 0.96), (0.022, 0.016, 0.015), (0.042, 0.028, 0.034), 1),
    ],
)
def test_likeness_on_altered_prompts_counts(
    agreements: tuple[float, ...],
    likelihoods: tuple[float, ...],
    divergences: tuple[float, ...],
    chosen: int,
) -> None:
    found = zip(agreements, likelihoods, divergences, strict=True)
    points = [TrainingPoint(i, 1.0, None, None, *figures) for i, figures in enumerate(found)]
    assert choose_step(points, validation_rows=50) == chosen


def test_hidden_states_come_nearer(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    weights = {"kl_weight": 0.0, "hidden_weight": 1000.0}
    spec = SPEC.model_copy(update={**weights, "learning_rate": 1e-4})
    near = points(run(checkpoint, dataset, tmp_path / "near", spec))
    assert near[-1]["validation_kld"] < 0.9 * near[0]["validation_kld"]
    # What is told of the first step is in nats a token all the same.
    run(checkpoint, dataset, tmp_path / "plain", spec.model_copy(update={"hidden_weight": 1e-6}))
    first = [
        next(point["loss"] for point in json.loads(file.read_text("utf-8")) if point["loss"])
        for file in tmp_path.glob("*/fit-*/training.json")
    ]
    assert len(first) == 2
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_hidden_error_is_of_the_tokens_that_count() -> None:
    part = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "labels": torch.tensor([[-100, -100, 7, 8, -100], [-100, 9, -100, -100, -100]]),
    }
    # Those that lead to the answer; not the first one, where attention rests, and no padding.
    # In all they weigh as much as the answer has tokens: two, and none where nothing is left.
    weights = fitting._token_weights(part)
    assert weights.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0], [0.0] * 5]
    wanted = [torch.full((2, 5, 3), 2.0), torch.full((2, 5, 3), 4.0)]
    given = [state.clone() for state in wanted]
    given[0][0, 1] += 1.0  # (3 x 1) / (3 x 4) in one of two layers
    given[1][0, 0] += 9.0
    assert float(fitting.hidden_error(given, wanted, weights)) == pytest.approx(0.25 / 2)
    # A student without some layers is compared behind the last.
    assert float(fitting.hidden_error(given[1:], wanted, weights)) == 0.0
    assert float(fitting.hidden_error(given[:1], wanted, weights)) > 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_behind_each_layer(family: str, tmp_path: Path) -> None:
    model = load_model(family_student(tmp_path, family).folder)
    part = {"input_ids": torch.tensor([[1, 5, 9, 7]])}
    seen: list[Any] = []
    layers = model.get_decoder().layers
    layers[0].register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        states, last = fitting._hidden(model, part)
    assert len(states) == len(layers)
    assert states[-1] is last
    first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(states[0], first)


def test_the_gradient_does_not_depend_on_the_parts(
    checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = StudentPrompt(checkpoint.folder, PROMPT)
    rows = training_rows(read_rows(dataset.folder / "train.jsonl"), shown, 512)[:4]
    batch = collate([rows], shown.stop_id)
    taught = fitting.Teaching(
        checkpoint.folder, checkpoint.folder, allocation(checkpoint, "Q4_0"), SPEC, "fp32"
    )
    found = []
    for tokens in (1, 10**6):  # a row at a time, all at once
        monkeypatch.setitem(PART_TOKENS, "cpu", tokens)
        latent = taught.build()
        taught.backward(latent, batch, lambda loss: loss.backward())
        found.append([weight.grad for weight in latent.trained.values()])
    assert any(grad.abs().max() > 0 for grad in found[0])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_altered_validation_prompts_are_compared(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    measured = points(run(checkpoint, dataset, tmp_path / "near"))
    assert measured[0]["validation_kld"] > 0  # what rounding to Q4_0 costs
    # The same prompts for every seed, so the start is the same.
    other = SPEC.model_copy(update={"seed": 1, "epochs": 1})
    start = points(run(checkpoint, dataset, tmp_path / "other", other))[0]
    assert start["validation_kld"] == measured[0]["validation_kld"]
    alone = SPEC.model_copy(update={**ALONE, "epochs": 1})
    unlike = points(run(checkpoint, dataset, tmp_path / "unlike", alone))
    assert [point["validation_kld"] for point in unlike] == [None] * len(unlike)


@dataclass
class StopsAt(Silent):
    """Interrupted when `label` begins for the `times`-th time."""

    label: str
    count: int

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return _Counting(self.count) if label == self.label else SilentTask()


@dataclass
class _Counting(SilentTask):
    left: int

    def advance(self, amount: float = 1, shown: str = "") -> None:
        self.left -= round(amount)
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "precision"), [("Q4_0", "fp32"), ("Q4_K", "fp32"), ("Q4_0", "bf16")]
)
def test_a_killed_fitting_ends_with_the_same_bytes(
    checkpoint: Checkpoint,
    dataset: Dataset,
    tmp_path: Path,
    kind: str,
    precision: Literal["fp32", "bf16"],
) -> None:
    lesson = DistillSpec(precision=precision)
    whole = run(checkpoint, dataset, tmp_path / "whole", kind=kind, lesson=lesson)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, dataset, tmp_path / "killed", SPEC, kind, StopsAt("fit", 9), lesson)
    again = run(checkpoint, dataset, tmp_path / "killed", kind=kind, lesson=lesson)
    facts = json.loads((again.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["resumed_from_step"] > 0
    assert again.digest == whole.digest


@dataclass
class KilledBehind(Silent):
    """Interrupted when the task `label` is done."""

    label: str

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        return _Killed() if label == self.label else SilentTask()


class _Killed(SilentTask):
    def __exit__(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_a_fitting_killed_where_patience_ended_it_is_not_trained_on(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    ruinous = {"learning_rate": 0.5, "patience": 1, "checkpoints": SPEC.evaluations}
    spec = SPEC.model_copy(update=ruinous)
    whole = run(checkpoint, dataset, tmp_path / "whole", spec)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, dataset, tmp_path / "killed", spec, progress=KilledBehind("fit"))
    again = run(checkpoint, dataset, tmp_path / "killed", spec)
    facts = json.loads((again.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["steps"] == facts["resumed_from_step"] == points(whole)[-1]["step"]
    assert again.digest == whole.digest


@pytest.mark.parametrize("near", [False, True])
def test_a_fitting_killed_before_its_first_checkpoint_begins_anew(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, near: bool
) -> None:
    spec = SPEC.model_copy(update={"min_kld": 1e9 if near else 0.0})
    whole = run(checkpoint, dataset, tmp_path / "whole", spec)
    stop = KilledBehind("fit") if near else StopsAt("fit", 0)  # at its first step
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, dataset, tmp_path / "killed", spec, progress=stop)
    kept = [folder.name for folder in tmp_path.glob("killed/fit-*/resume/evaluated/*")]
    assert kept == ["0"]
    again = run(checkpoint, dataset, tmp_path / "killed", spec)
    facts = json.loads((again.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["resumed_from_step"] == 0
    assert again.digest == whole.digest


def test_what_the_last_checkpoint_leads_to_is_kept(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    """A run that goes on from there on another machine may not choose the newer one again."""
    steps = [point["step"] for point in points(run(checkpoint, dataset, tmp_path / "whole"))]
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, dataset, tmp_path, SPEC, "Q4_0", StopsAt("fit", steps[3]))
    kept = {int(folder.name) for folder in tmp_path.glob("fit-*/resume/evaluated/*")}
    assert kept == {steps[2], steps[3]}


@pytest.mark.parametrize("rank", [None, 4])
def test_the_gradient_passes_straight_through(checkpoint: Checkpoint, rank: int | None) -> None:
    model = load_model(checkpoint.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    latent = Latent(model, {name: "Q4_0"}, rank, seed=0, importance={})
    latent.refresh()
    own = dict(model.named_parameters())[name]
    assert torch.equal(own.data, quantize_dequantize(latent.weight(name), "Q4_0"))
    given = torch.randn_like(own)
    own.grad = given.clone()
    latent.collect()
    found = [p.grad for p in latent.trained.values()]
    if rank is None:
        assert torch.equal(found[0], given)
    else:
        down, up = latent.trained.values()
        assert torch.allclose(up.grad, 2 * given @ down.T)
        assert torch.equal(down.grad, torch.zeros_like(down))  # B is zero at the start


def test_the_file_holds_what_was_fitted(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    given = allocation(checkpoint, "Q4_0")
    student = replace(tiny.tiny_student(tmp_path / "s"), folder=checkpoint.folder)
    exported = export(checkpoint, student, "recipe", tmp_path, Silent(), "F32")
    variant = Variant("mine", checkpoint, None, given, exported, True, None)
    file = tmp_path / "made.gguf"
    quantize_file(exported.model, file, "Q8_0", types=given.types)
    prove(variant, Quantized(tmp_path, "right", file, "mine"), tmp_path, Silent())
    quantize_file(exported.model, file, "Q8_0", types={**given.types, OTHER: "Q4_1"})
    with pytest.raises(GateFailed, match=f"1 of .* are not what was fitted: {OTHER}"):
        prove(variant, Quantized(tmp_path, "wrong", file, "mine"), tmp_path, Silent())


def test_a_head_of_its_own_leaves_the_embedding_without_importance(
    dataset: Dataset, tmp_path: Path
) -> None:
    student = tiny.tiny_student(tmp_path / "untied")
    folder = student.folder
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": False}), "utf-8"
    )
    checkpoint = Checkpoint(folder, "untied")
    weighed = weigh(checkpoint, dataset, PROMPT, tmp_path, Silent())
    given = replace(allocation(checkpoint, "Q4_0"), importance=weighed.file)
    exported = export(checkpoint, student, "recipe", tmp_path, Silent(), "F32")
    variant = Variant("mine", checkpoint, None, given, exported, True, None)
    file = tmp_path / "made.gguf"
    quantize_file(exported.model, file, "Q8_0", importance=weighed.file, types=given.types)
    prove(variant, Quantized(tmp_path, "right", file, "mine"), tmp_path, Silent())


def test_the_onnx_model_holds_what_was_fitted(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    given = allocation(checkpoint, "int4-b32")
    types = {**given.types, "token_embd.weight": "int8-b32", OTHER: "int8-b32"}
    given = replace(given, types=types)
    fitted = fit(
        checkpoint, checkpoint, given, dataset, PROMPT, LESSON, SPEC, CHECK,
        tmp_path, Silent(),
    )  # fmt: skip
    variant = Variant("mine", fitted, None, given, None, True, None)
    model = tmp_path / "made"
    build_onnx(fitted.folder, model, "int4-b32", types=types)
    prove(variant, Quantized(tmp_path, "right", model, "mine"), tmp_path, Silent())
    build_onnx(checkpoint.folder, model, "int4-b32", types=types)
    with pytest.raises(GateFailed, match=r"15 of 15 matrices in the file are not what was fitted"):
        prove(variant, Quantized(tmp_path, "wrong", model, "mine"), tmp_path, Silent())


OTHER = "blk.1.ffn_up.weight"
