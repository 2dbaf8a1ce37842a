"""Export by `optimum`: the folder layout that transformers.js and ORTModelForCausalLM read.

`onnx/model.onnx` is the checkpoint in fp32, the files beside it hold fewer bytes; their names are
those transformers.js derives from its `dtype`. optimum needs an older transformers than ours, so
it runs in an environment of its own (own_environment.py, optimum_child.py). The tokenizer's files
are the student's, byte for byte: optimum would write its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import (
    RESUME,
    Checkpoint,
    Exported,
    Identity,
    digest_of_file,
    run_stage,
    write_json,
)
from edgedistill.errors import ArtifactError
from edgedistill.own_environment import LISTS, OwnEnvironment, prepare, read_pins, run_script
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec

CHILD = Path(__file__).with_name("optimum_child.py")
PINS = LISTS / "optimum.txt"
STEP_SECONDS = 3600.0  # longest wait for one file
ONNX = "onnx"
CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Format:
    """One model file: `dtype` is transformers.js's name for it, `bits` those of its matrices."""

    dtype: str
    file: str
    bits: int | None = None


# Weight-only: the activations stay fp32. "q8" is what transformers.js takes in a browser unasked.
FORMATS = (
    Format("fp32", "model.onnx"),
    Format("q8", "model_quantized.onnx", 8),
    Format("q4", "model_q4.onnx", 4),
)


def export_optimum(
    checkpoint: Checkpoint, prompt: StudentSpec, out: Path, progress: Progress
) -> Exported:
    """Stage "export-optimum"; `model` of what it returns is the fp32 file.

    Raises:
        MissingTool: the environment of optimum cannot be made.
        RuntimeFailure: optimum lacks the architecture, or died.
        ArtifactError: RoPE parameters that transformers 4 has no name for.
    """
    pins = read_pins(PINS)
    identity = Identity(
        stage="export-optimum",
        version=1,
        spec={"formats": {format.dtype: format.bits for format in FORMATS}},
        inputs={"checkpoint": checkpoint.digest},
        tools={"environment": pins.digest, "script": digest_of_file(CHILD)},
    )

    def work(folder: Path) -> dict[str, Any]:
        config = read_config(checkpoint.folder)
        student = StudentPrompt(checkpoint.folder, prompt)
        environment = prepare(pins, progress)
        facts = _write_models(checkpoint.folder, config, folder, environment, progress)
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            shutil.copyfile(checkpoint.folder / name, folder / name)
        write_json(folder / CONFIG, config | _for_javascript(folder / ONNX))
        write_json(folder / GENERATION, _generation(checkpoint.folder, config, student))
        return {"files": facts, "architecture": config["model_type"]}

    done = run_stage(identity, out, progress, work)
    return Exported(done.folder, done.digest, done.folder / ONNX / FORMATS[0].file)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json with RoPE by the names of transformers 4 and 5 both.

    transformers 4 does not know `rope_parameters`: it would take its own default without a word.

    Raises:
        ArtifactError: no config, or other RoPE parameters for each kind of layer.
    """
    file = checkpoint / CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"this checkpoint cannot be read: {error}", where=str(file)) from error
    rope = config.get("rope_parameters")
    if rope is None:
        return config
    if any(isinstance(value, Mapping) for value in rope.values()):
        rope, local = _of_layers(rope, file)
        config["rope_local_base_freq"] = local
    config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    own = {"rope_theta", "partial_rotary_factor"}
    scaling = {name: value for name, value in rope.items() if name not in own}
    config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return config


def _of_layers(rope: Mapping[str, Any], file: Path) -> tuple[Mapping[str, Any], float]:
    """Gemma 3's two kinds of layers: parameters of the full ones, theta of the sliding ones."""
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    plain = {"rope_theta", "rope_type"}
    if (
        len(rope) != 2
        or full is None
        or sliding is None
        or not sliding.keys() <= plain
        or sliding.get("rope_type", "default") != "default"
    ):
        raise ArtifactError(
            f"its RoPE parameters have no names in transformers 4: {json.dumps(rope)}",
            where=str(file),
            hint="export this model with --layout gguf",
        )
    return full, sliding["rope_theta"]


def _write_models(
    checkpoint: Path,
    config: Mapping[str, Any],
    folder: Path,
    environment: OwnEnvironment,
    progress: Progress,
) -> dict[str, Any]:
    scratch, source = folder / RESUME, folder / ONNX / FORMATS[0].file
    facts = {}
    for made in (scratch, folder / ONNX):
        made.mkdir(exist_ok=True)
    with progress.task("export by optimum", len(FORMATS), "files") as task:
        for format in FORMATS:
            into = folder / ONNX / format.file
            request: dict[str, Any] = {"into": str(into)}
            if format.bits is None:
                request |= {"do": "export", "checkpoint": str(checkpoint)}
                request |= {"config": dict(config), "scratch": str(scratch)}
            else:
                request |= {"do": "quantize", "source": str(source), "bits": format.bits}
            said = run_script(environment, CHILD, request, STEP_SECONDS)
            facts[format.dtype] = {**said, "file": into.name, "bytes": size_of(into)}
            task.advance()
    return facts


def size_of(file: Path) -> int:
    """Bytes of a model file and of the one with its weights, where protobuf could not hold them."""
    weights = file.with_name(f"{file.name}_data")
    return file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def _for_javascript(folder: Path) -> dict[str, Any]:
    """What transformers.js must be told: which model files have their weights in another file."""
    outside = {path.name.removesuffix("_data"): 1 for path in sorted(folder.glob("*.onnx_data"))}
    return {"transformers.js_config": {"use_external_data_format": outside}} if outside else {}


def _generation(
    checkpoint: Path, config: Mapping[str, Any], student: StudentPrompt
) -> dict[str, Any]:
    """The checkpoint's generation config with the end tokens that training taught."""
    file = checkpoint / GENERATION
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    ends = sorted(student.stop_ids)
    ids = {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    return {**ids, **found, "eos_token_id": ends[0] if len(ends) == 1 else ends}
