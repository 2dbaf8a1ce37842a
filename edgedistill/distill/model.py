"""The student with LoRA on all its linear layers, and the loss that it learns by."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Student, write_json
from edgedistill.recipe import DistillSpec
from edgedistill.torch_runtime import load_model
from edgedistill.training.loss import cross_entropy, supervised_logits

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def lora_model(student: Student, spec: DistillSpec) -> Any:
    """The fp32 base, frozen, with fresh LoRA layers; the same ones for the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    base = load_model(student.folder)
    base.config.use_cache = False
    set_seed(spec.seed)
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules="all-linear",  # peft leaves the output head out
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers by an old name; nothing of ours.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, config)


def supervised_loss(model: Any, batch: Any, reduction: str = "mean") -> Any:
    """Cross-entropy of the adapted model ("mean" or "sum") over the supervised tokens."""
    return cross_entropy(*supervised_logits(model.get_base_model(), batch), reduction)


def save_adapter(model: Any, folder: Path, student: Student) -> None:
    """peft's layout, with nothing in it that differs between two equal runs."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": student.name, "inference_mode": True}
    write_json(folder / CONFIG, {name: _stable(config[name]) for name in sorted(config)})


def _stable(value: Any) -> Any:
    # Sets have another order in every process.
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
