"""Adapter into base, in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_student

from edgedistill.artifacts import Adapter, Student
from edgedistill.distill.model import save_adapter, trained_model
from edgedistill.errors import ArtifactError
from edgedistill.merge import merge
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.progress import Silent
from edgedistill.student import TOKENIZER_FILES
from edgedistill.torch_runtime import TorchModel

IDS = [5, 40, 41, 90, 17, 60, 2]


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return tiny_student(tmp_path / "student")


@pytest.fixture
def adapter(student: Student, tmp_path: Path) -> Adapter:
    """One that changes the model: LoRA begins with B = 0."""
    import torch

    model = trained_model(student.folder, DistillSpec(lora=LoraSpec(rank=4)))
    torch.manual_seed(1)
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.05)
    save_adapter(model, tmp_path / "adapter", student)
    return Adapter(tmp_path / "adapter", "adapter", 1)


def test_merged_predicts_what_the_adapted_model_predicts(
    student: Student, adapter: Adapter, tmp_path: Path
) -> None:
    done = merge(adapter, student, tmp_path, Silent())
    (adapted,) = TorchModel(student.folder, adapter.folder).logits([(IDS, 3)])
    (merged,) = TorchModel(done.folder).logits([(IDS, 3)])
    (base,) = TorchModel(student.folder).logits([(IDS, 3)])
    assert np.abs(merged - adapted).max() < 1e-4 < 0.01 < np.abs(base - adapted).max()


def test_the_company_of_a_row_does_not_change_its_logits(student: Student) -> None:
    model = TorchModel(student.folder)
    rows = [(IDS[: 4 + at], 1 + at % 3) for at in range(len(IDS) - 4)] * 40
    together = list(model.logits(rows))
    assert [len(made) for made in together] == [len(ids) - first for ids, first in rows]
    for row, made in zip(rows[-5:], together[-5:], strict=True):
        (alone,) = model.logits([row])
        assert np.abs(made - alone).max() < 1e-4


def test_same_bytes_twice_and_nothing_of_this_machine(
    student: Student, adapter: Adapter, tmp_path: Path
) -> None:
    first = merge(adapter, student, tmp_path / "a", Silent())
    second = merge(adapter, student, tmp_path / "b", Silent())
    assert first.digest == second.digest
    for name in TOKENIZER_FILES:
        assert (first.folder / name).read_bytes() == (student.folder / name).read_bytes()
    for file in (*first.folder.glob("*.json"), *adapter.folder.glob("*.json")):
        assert str(tmp_path) not in file.read_text("utf-8")


def test_half_precision_base_is_refused(student: Student, adapter: Adapter, tmp_path: Path) -> None:
    file = student.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is F16"):
        merge(adapter, student, tmp_path, Silent())


def test_quantized_base_is_refused(student: Student, adapter: Adapter, tmp_path: Path) -> None:
    file = student.folder / "config.json"
    config = json.loads(file.read_text("utf-8")) | {"quantization_config": {"bits": 4}}
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ArtifactError, match="quantized"):
        merge(adapter, replace(student, digest="other"), tmp_path, Silent())


def test_bitsandbytes_says_nothing_where_it_is_not_used() -> None:
    pytest.importorskip("bitsandbytes")
    code = "import edgedistill.merge, peft.tuners.lora.bnb"  # it warns on CPUs with AVX512-BF16
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in done.stderr
