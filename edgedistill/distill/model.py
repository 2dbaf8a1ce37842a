"""The student as it is trained: which of its weights learn, and what is kept of them."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Student, write_json
from edgedistill.errors import MissingTool, TrainingError
from edgedistill.methods import DistillSpec, LoraSpec
from edgedistill.torch_runtime import WHOLE, device, load_model
from edgedistill.training.fused import fuse
from edgedistill.training.learner import hold_in_bf16

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def trained_model(folder: Path, spec: DistillSpec, start: Path | None = None) -> Any:
    """The model of a checkpoint folder on the CPU, with fresh LoRA layers over frozen weights (the
    same ones for the same seed), or those of the adapter folder `start`, or all of it trained.

    Raises:
        TrainingError: the rank is larger than a layer is wide.
        MissingTool: qlora without bitsandbytes.
    """
    from transformers import set_seed

    if spec.tuning == "full":
        model = load_model(folder if start is None else start)
        model.config.use_cache = False
        return model
    base = _four_bit(folder) if spec.tuning == "qlora" else load_model(folder)
    base.config.use_cache = False
    require_rank(base, spec.lora)
    set_seed(spec.seed)
    adapted = _fresh(base, spec) if start is None else _from(base, start)
    if spec.precision == "bf16" and spec.tuning != "qlora":
        hold_in_bf16(adapted.get_base_model(), device().type)
    if device().type == "cuda" and not spec.compile:
        fuse(adapted)
    return adapted


def asked_model(folder: Path, spec: DistillSpec, start: Path | None) -> Any:
    """The model that training would begin with, on the CPU, to be asked: nothing of it learns.
    Without `start` it is the checkpoint itself.

    Raises:
        MissingTool: qlora without CUDA or bitsandbytes.
    """
    if start is not None:
        model = trained_model(folder, spec, start)
        model.requires_grad_(False)
        return model
    if spec.tuning == "qlora":
        return _four_bit(folder)
    model = load_model(folder)
    model.requires_grad_(False)
    if spec.precision == "bf16" and spec.tuning != "full":
        hold_in_bf16(model, device().type)
    if device().type == "cuda" and not spec.compile:
        fuse(model)  # its norms, as in the training that begins with it
    return model


def _fresh(base: Any, spec: DistillSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules="all-linear",  # peft leaves the output head out
        use_dora=spec.tuning == "dora",
        use_rslora=spec.tuning == "rslora",
        task_type="CAUSAL_LM",
    )
    with _old_names():
        return get_peft_model(base, config)


def _from(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with _old_names():
        return PeftModel.from_pretrained(
            base, str(adapter), local_files_only=True, is_trainable=True
        )


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """peft asks transformers by an old name, which warns; nothing of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def require_rank(model: Any, spec: LoraSpec) -> None:
    """Refuse a rank above the smaller side of a layer: such an update is no smaller than the layer.

    Raises:
        TrainingError: names the narrowest layer.
    """
    import torch

    head = model.get_output_embeddings()
    sides = {
        name: min(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    name, side = min(sides.items(), key=lambda found: found[1])
    if spec.rank > side:
        raise TrainingError(
            f"the rank is {spec.rank}, and {name} is only {side} wide",
            hint=f"set distill.lora.rank (for a proxy distill.proxy.lora.rank) to at most {side}",
        )


def require_rank_of(folder: Path, spec: LoraSpec) -> None:
    """The same of a checkpoint folder, from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        require_rank(AutoModelForCausalLM.from_config(config), spec)


def _four_bit(folder: Path) -> Any:
    """Frozen weights in 4-bit NormalFloat, products in bf16 (QLoRA, arXiv 2305.14314)."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise MissingTool(
            "the package bitsandbytes is not installed, and distill.tuning is qlora",
            hint='in the checkout: pip install -e ".[qlora]"',
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        str(folder),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        device_map={"": str(device())},
    )


def save_adapter(model: Any, folder: Path, student: Student) -> None:
    """peft's layout, with nothing in it that differs between two equal runs; of a model that was
    trained whole, its checkpoint."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if not hasattr(model, "peft_config"):
        _save_whole(model, folder, student)
        return
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": student.name, "inference_mode": True}
    write_json(folder / CONFIG, {name: _stable(config[name]) for name in sorted(config)})


def _save_whole(model: Any, folder: Path, student: Student) -> None:
    from safetensors.torch import save_file

    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if not (tied and name == "lm_head.weight")
    }
    save_file(state, folder / WHOLE, metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (student.folder / name).is_file():
            shutil.copyfile(student.folder / name, folder / name)


def _stable(value: Any) -> Any:
    # Sets have another order in every process.
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
