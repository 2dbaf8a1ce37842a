"""Our training beside TRL's SFTTrainer: tokens/s and peak memory on the same model and rows.

    python benchmarks/training_throughput.py STUDENT DATASET [--system SQL] [--steps 20]
        [--batch-size 4] [--rank 32] [--precision fp32] [--rounds 3]

STUDENT and DATASET are finished `student-*` and `curate-*` folders of a workspace. TRL (and
`datasets`, which it needs) must be importable; it runs with its defaults, padding-free, packed
(best-fit decreasing), and with rows grouped by length. Each runs in a process of its own, in turn,
`rounds` times. A step's time is from Trainer's on_step_begin to on_step_end in all of them; tokens
are those of the rows, padding not counted. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill import machine

TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl, rows of like length": {"train_sampling_strategy": "group_by_length"},
    "trl, padding-free": {"padding_free": True, "max_length": None},
    "trl, packed": {"packing": True},
}
OURS = "edgedistill"
LENGTH = 512  # tokens of a packed sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("student", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--system")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one of them, in this process
    given = parser.parse_args()
    if given.only:
        sys.stdout.write(json.dumps(_one(given)) + "\n")
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *TRL)}
    for _ in range(given.rounds):
        for name, runs in found.items():
            runs.append(_child(name))
    value = {"machine": machine.facts(), "given": vars(given), "runs": found}
    print(json.dumps({**value, "ratios": _ratios(found)}, indent=2, default=str))


def _child(name: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=machine.child_environment())
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def _ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ours over theirs, each the median over rounds."""

    def median(name: str, figure: str) -> float | None:
        values = [run[figure] for run in found[name] if figure in run]
        return statistics.median(values) if values else None

    def ratio(name: str, figure: str) -> float | None:
        ours, theirs = median(OURS, figure), median(name, figure)
        return ours / theirs if ours and theirs else None

    return {name: {f: ratio(name, f) for f in ("tokens_per_second", "peak_bytes")} for name in TRL}


def _one(given: argparse.Namespace) -> dict[str, Any]:
    from edgedistill.fidelity import read_rows
    from edgedistill.prompting import StudentPrompt
    from edgedistill.recipe import StudentSpec
    from edgedistill.torch_runtime import device
    from edgedistill.training.data import training_rows

    spec = StudentSpec(weights="benchmark", system=given.system)
    shown = StudentPrompt(given.student, spec)
    rows = training_rows(read_rows(given.dataset / "train.jsonl"), shown, None)
    where = device()
    with tempfile.TemporaryDirectory() as scratch:
        run = _ours if given.only == OURS else _trl
        seconds, tokens, losses = run(given, rows, shown.stop_id, Path(scratch))
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "tokens_per_step": statistics.fmean(tokens),
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": _peak(where.type),
    }


def _peak(kind: str) -> int:
    if kind == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    from edgedistill.answering import peak_memory_bytes

    return peak_memory_bytes()


def _ours(given: argparse.Namespace, rows: Sequence[Any], stop: int, scratch: Path) -> Any:
    from edgedistill.distill.model import trained_model
    from edgedistill.methods import DistillSpec, LoraSpec
    from edgedistill.progress import Silent
    from edgedistill.torch_runtime import device
    from edgedistill.training.course import Course, Examined, Schedule
    from edgedistill.training.data import PART_TOKENS, plan_batches
    from edgedistill.training.learner import Learner, Packer, backward, nll_loss
    from edgedistill.training.trainer import train

    lora = LoraSpec(rank=given.rank, alpha=2 * given.rank)
    spec = DistillSpec(lora=lora, precision=given.precision)
    epochs = given.steps * given.batch_size / len(rows)
    batches = plan_batches(rows, given.batch_size, epochs, 0)
    course = Course(
        batches=batches,
        batches_per_epoch=len(batches),
        schedule=Schedule(4e-4, 0.05, 0.0, 1, 1, 0),
        collate=Packer(PART_TOKENS[device().type]),
        build=lambda: Learner(trained_model(given.student, spec), nll_loss),
        backward=lambda model, batch, run: backward(model, batch, run, spec.precision),
        examine=lambda model: Examined(0.0),
        keep=lambda model, folder: None,
        choose=lambda points: points[-1].step,
    )
    done = train(course, scratch, Silent())
    tokens = [sum(map(len, batch)) for batch in batches]
    return done.facts["step_seconds"], tokens, [point.loss for point in done.points]


def _trl(given: argparse.Namespace, rows: Sequence[Any], stop: int, scratch: Path) -> Any:
    import torch
    from datasets import Dataset  # type: ignore[import-not-found,unused-ignore]
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    from edgedistill.torch_runtime import device, load_model

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(given.student / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stop)
    told = [
        {
            "input_ids": [*row.prompt, *row.answer],
            "completion_mask": [0] * len(row.prompt) + [1] * len(row.answer),
        }
        for row in rows
    ]
    seconds: list[float] = []
    tokens: list[int] = []

    class Timing(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            return super().training_step(model, inputs, *rest)

    on_cpu = device().type == "cpu"
    arguments = SFTConfig(
        output_dir=str(scratch),
        max_steps=given.steps,
        per_device_train_batch_size=_rows_a_step(given, rows),
        learning_rate=4e-4,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=on_cpu,
        bf16=given.precision == "bf16",
        gradient_checkpointing=False,
        completion_only_loss=True,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": False},
        **{"max_length": LENGTH, **TRL[given.only]},
    )
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    model = load_model(given.student).to(dtype)
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(told),
        processing_class=tokenizer,
        callbacks=[Timing()],
        peft_config=LoraConfig(
            r=given.rank,
            lora_alpha=2 * given.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(seconds), tokens, losses


def _rows_a_step(given: argparse.Namespace, rows: Sequence[Any]) -> int:
    """A packed sequence holds many rows: as many tokens a step as the others have."""
    if "packed" not in given.only:
        return int(given.batch_size)
    length = statistics.fmean(map(len, rows))
    return max(1, int(given.batch_size * length / LENGTH + 0.5))


if __name__ == "__main__":
    main()
