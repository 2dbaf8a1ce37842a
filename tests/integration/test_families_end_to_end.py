"""Every family from training to both runtimes: an adapter is trained, merged and exported, and each
hand-over is measured on the same tokens. `python tests/integration/test_families_end_to_end.py`
prints the table of docs/students.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ == "__main__":  # pytest finds by itself what tests share
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import tiny_dataset
from tiny_families import FAMILIES, SMALL, family_student, kld, random_ids

from edgedistill.artifacts import Checkpoint, Student
from edgedistill.check_specs import TextCheck
from edgedistill.distill import distill
from edgedistill.export import export
from edgedistill.export.onnx import export_onnx
from edgedistill.families import BY_SOURCE
from edgedistill.merge import merge
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.onnx_runtime import OnnxGenai
from edgedistill.progress import Silent
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp
from edgedistill.tensors import read_layout
from edgedistill.torch_runtime import TorchModel

pytestmark = pytest.mark.integration
# One of each of families.FAMILIES; other forms: test_families.py, test_onnx_families.py.
ONE_OF_EACH = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
TUNINGS = {"dora": "phi3", "rslora": "qwen2", "full": "qwen3"}
TOKENS = 112  # beyond Gemma's window here, and as far as llama.cpp is exact for Phi-3's
SPEC = DistillSpec(
    lora=LoraSpec(rank=4, alpha=8),
    batch_size=2,
    epochs=3,
    learning_rate=1e-2,
    precision="fp32",
    evaluations=1,
)


@dataclass(frozen=True)
class Handover:
    """Mean KLD in nats a token of a student to its next form, and the bound for it."""

    name: str
    mean_kld: float
    bound: float


def handovers(name: str, folder: Path, tuning: Any = "lora") -> Iterator[Handover]:
    """Train one of tiny_families.FAMILIES a few steps and hand it on, by LoRA to both runtimes.

    The first is what the training changes: of a student that learnt nothing, nothing is proven.
    GGUF has matrices in f16; of Gemma's ONNX model the embedding is scaled by a rounded number.
    """
    student = family_student(folder / "student", name, **SMALL)
    dataset = tiny_dataset(folder / "dataset", rows=2)
    prompt, check = StudentSpec(weights="tiny", max_tokens=2), TextCheck(kind="exact")
    spec = SPEC.model_copy(update={"tuning": tuning})
    adapter = distill(dataset, student, prompt, spec, check, folder, Silent())
    adapted = in_torch(student.folder, adapter.folder)
    yield Handover("base", mean_kld(in_torch(student.folder), adapted), float("inf"))
    checkpoint = merge(adapter, student, folder, Silent())
    merged = in_torch(checkpoint.folder)
    yield Handover("merged", mean_kld(adapted, merged), 1e-10)
    if tuning == "lora":
        runtimes = exported(checkpoint, student, folder)
        yield Handover("GGUF", mean_kld(merged, next(runtimes)), 1e-5)
        yield Handover("ONNX", mean_kld(merged, next(runtimes)), 1e-6)


def in_torch(folder: Path, adapter: Path | None = None) -> Any:
    (found,) = TorchModel(folder, adapter).logits([(random_ids(TOKENS), 1)])
    return found


def exported(checkpoint: Checkpoint, student: Student, folder: Path) -> Iterator[Any]:
    """Logits of llama.cpp and of onnxruntime-genai, from their exports."""
    made = export(checkpoint, student, "tiny", folder, Silent())
    with LlamaCpp(made.model, threads=1, context_tokens=128) as runtime:
        yield logits_of(runtime, folder)
    made = export_onnx(checkpoint, student, "tiny", folder, Silent())
    with OnnxGenai(made.model, threads=1, context_tokens=128) as runtime:
        yield logits_of(runtime, folder)


def logits_of(runtime: Any, folder: Path) -> Any:
    file = folder / "logits.f32"
    runtime.logits(random_ids(TOKENS), 1, file)
    found = np.fromfile(file, np.float32).reshape(TOKENS - 1, -1)
    file.unlink()
    return found


def mean_kld(wanted: Any, found: Any) -> float:
    return float(kld(wanted, found).mean())


def test_each_family_has_its_turn() -> None:
    kinds = {"gemma3_text": "gemma3"}
    sources = {kinds.get(FAMILIES[name][0], FAMILIES[name][0]) for name in ONE_OF_EACH}
    assert sources == {source.removesuffix("ForCausalLM").lower() for source in BY_SOURCE}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_hand_over_loses_anything(tmp_path: Path, name: str) -> None:
    learnt, *found = handovers(name, tmp_path)
    assert learnt.mean_kld > 1e-3
    assert [each.name for each in found] == ["merged", "GGUF", "ONNX"]
    for each in found:
        assert each.mean_kld < each.bound, each


@pytest.mark.parametrize(("tuning", "name"), TUNINGS.items())
def test_every_tuning_is_merged_as_it_was_trained(tmp_path: Path, tuning: str, name: str) -> None:
    learnt, merged = handovers(name, tmp_path, tuning)
    assert learnt.mean_kld > 1e-3
    assert merged.mean_kld < merged.bound


def main() -> None:
    """Print the table."""
    links = ("base → adapter", "adapter → merged", "merged → GGUF", "merged → ONNX")
    print(f"| family | trained by | {' | '.join(links)} |")
    print("|---|---|---|---|---|---|")
    for tuning, name in [*(("lora", name) for name in ONE_OF_EACH), *TUNINGS.items()]:
        with tempfile.TemporaryDirectory() as folder:
            found = [f"{each.mean_kld:.0e}" for each in handovers(name, Path(folder), tuning)]
            family = read_layout(Path(folder) / "student").family.name
        cells = [family, tuning, *found, *[""] * (4 - len(found))]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
