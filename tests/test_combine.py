"""Several adapters as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_student

from edgedistill.artifacts import Adapter, Student
from edgedistill.combine import combine
from edgedistill.distill.model import CONFIG, save_adapter, trained_model
from edgedistill.errors import ArtifactError
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.recipe import AddedAdapter, MergeSpec
from edgedistill.torch_runtime import TorchModel

IDS = [5, 40, 41, 90, 17, 60, 2]


def made(student: Student, folder: Path, seed: int, rank: int, tuning: Any = "lora") -> Adapter:
    import torch

    spec = DistillSpec(tuning=tuning, lora=LoraSpec(rank=rank, alpha=2 * rank))
    model = trained_model(student.folder, spec)
    torch.manual_seed(seed)
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.05)
    save_adapter(model, folder, student)
    (folder / "training.json").write_text("[]", "utf-8")
    return Adapter(folder, f"adapter-{seed}", 1)


def logits(student: Student, adapter: Path | None) -> Any:
    (found,) = TorchModel(student.folder, adapter).logits([(IDS, 3)])
    return found


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return tiny_student(tmp_path / "student")


def spec_of(*others: tuple[Adapter, float]) -> MergeSpec:
    return MergeSpec(
        adapters=tuple(AddedAdapter(path=a.folder, weight=weight) for a, weight in others)
    )


def test_the_update_is_the_weighted_sum(student: Student, tmp_path: Path) -> None:
    from peft import PeftModel

    from edgedistill.torch_runtime import load_model

    first = made(student, tmp_path / "a", 1, 4)
    second = made(student, tmp_path / "b", 2, 8, "rslora")
    done = combine(first, spec_of((second, 0.5)), tmp_path, Silent())
    base = load_model(student.folder)
    before = {name: values.clone() for name, values in base.state_dict().items()}
    wanted = {name: values.clone() for name, values in before.items()}
    for adapter, weight in ((first, 1.0), (second, 0.5)):
        plain = load_model(student.folder)
        merged = PeftModel.from_pretrained(plain, str(adapter.folder)).merge_and_unload()
        for name, values in merged.state_dict().items():
            wanted[name] += weight * (values - before[name])
    base.load_state_dict(wanted)
    (sums,) = TorchModel.of(base).logits([(IDS, 3)])
    assert np.abs(logits(student, done.folder) - sums).max() < 1e-3
    assert np.abs(logits(student, first.folder) - sums).max() > 0.01
    assert json.loads((done.folder / CONFIG).read_text("utf-8"))["r"] == 12


def test_none_to_add_changes_nothing(student: Student, tmp_path: Path) -> None:
    adapter = made(student, tmp_path / "a", 1, 4)
    assert combine(adapter, MergeSpec(), tmp_path, Silent()) is adapter


def test_what_cannot_be_added_is_refused(student: Student, tmp_path: Path) -> None:
    adapter = made(student, tmp_path / "a", 1, 4)
    dora = made(student, tmp_path / "b", 2, 4, "dora")
    with pytest.raises(ArtifactError, match="use_dora is True"):
        combine(adapter, spec_of((dora, 1.0)), tmp_path, Silent())
    with pytest.raises(ArtifactError, match="no adapter in peft's layout"):
        combine(adapter, spec_of((Adapter(tmp_path, "", 1), 1.0)), tmp_path, Silent())
    other = tiny_student(tmp_path / "other", architecture="qwen2")
    tensors = made(other, tmp_path / "c", 3, 4)
    (tensors.folder / "adapter_model.safetensors").write_bytes(_narrower(tensors))
    with pytest.raises(ArtifactError, match="another size"):
        combine(adapter, spec_of((tensors, 1.0)), tmp_path, Silent())


def _narrower(adapter: Adapter) -> bytes:
    from safetensors.numpy import load, save

    state = load((adapter.folder / "adapter_model.safetensors").read_bytes())
    cut = {name: values[:, :-1] if "lora_A" in name else values for name, values in state.items()}
    return bytes(save({name: np.ascontiguousarray(values) for name, values in cut.items()}))
