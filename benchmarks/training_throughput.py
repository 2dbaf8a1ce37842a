"""Our training beside TRL's SFTTrainer: tokens/s and peak memory on the same model and rows.

    python benchmarks/training_throughput.py STUDENT DATASET [--system SQL] [--steps 20]
        [--warm-up 3] [--batch-size 4] [--rank 32] [--precision fp32] [--length 512] [--rounds 3]
        [--variants "edgedistill;trl"]

STUDENT and DATASET are finished `student-*` and `curate-*` folders of a workspace. TRL (and
`datasets`, which it needs) must be importable; it runs with its defaults, padding-free, packed
(best-fit decreasing, into sequences of `length`), and with rows grouped by length. Each runs in a
process of its own, in turn, `rounds` times. Time is from the beginning of one step's forward pass
to that of the last, the first steps (`warm-up`) not counted; tokens are those of the rows, padding
not counted. On a known GPU ours also tells model-FLOPs utilisation. More variants:
"edgedistill, compiled" and "edgedistill, profiled" (where a GPU's time goes). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_time import Watched

from edgedistill import machine

TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl, rows of like length": {"train_sampling_strategy": "group_by_length"},
    "trl, padding-free": {"padding_free": True, "max_length": None},
    "trl, packed": {"packing": True},
}
OURS = "edgedistill"
COMPILED = "edgedistill, compiled"
PROFILED = "edgedistill, profiled"  # what a GPU does in its time; slower than unwatched
PROFILED_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("student", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--system")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default=";".join((OURS, *TRL)), help="separated by ;")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one of them, in this process
    given = parser.parse_args()
    counted = PROFILED_STEPS if PROFILED in (given.only, *given.variants.split(";")) else 1
    if given.steps < given.warm_up + counted + 1:
        parser.error(
            f"--steps: at least {given.warm_up + counted + 1}, {counted} behind the warm-up"
        )
    if given.only:
        sys.stdout.write(json.dumps(_one(given)) + "\n")
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.variants.split(";")}
    for _ in range(given.rounds):
        for name, runs in found.items():
            runs.append(_child(name))
    value = {"machine": machine.facts(), "given": vars(given), "runs": found}
    print(json.dumps({**value, "ratios": _ratios(found)}, indent=2, default=str))


def _child(name: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--only", name]
    ours = machine.child_environment()
    ours["PYTHONPATH"] += os.pathsep + str(Path(__file__).resolve().parent)  # of gpu_time.py
    done = subprocess.run(command, capture_output=True, text=True, env=ours)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-3:]}
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def _ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ours over theirs, each the median over rounds."""

    def median(name: str, figure: str) -> float | None:
        values = [run[figure] for run in found.get(name, ()) if figure in run]
        return statistics.median(values) if values else None

    def ratio(name: str, figure: str) -> float | None:
        ours, theirs = median(OURS, figure), median(name, figure)
        return ours / theirs if ours and theirs else None

    names = [name for name in found if name != OURS]
    figures = ("tokens_per_second", "peak_bytes")
    return {name: {figure: ratio(name, figure) for figure in figures} for name in names}


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
    watched = Watched(given.warm_up, given.warm_up + PROFILED_STEPS)
    timed = Timed(where.type, watched.step if given.only == PROFILED else lambda: None)
    with tempfile.TemporaryDirectory() as scratch:
        run = _trl if given.only in TRL else _ours
        losses, more = run(given, rows, shown.stop_id, Path(scratch), timed)
    seconds, tokens = timed.counted(given.warm_up)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": statistics.fmean(timed.tokens),
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": _peak(where.type),
        **{name: figure(seconds) for name, figure in more.items()},
        **watched.found,
    }


class Timed:
    """When each step began, and its tokens."""

    def __init__(self, kind: str, told: Callable[[], None]) -> None:
        self._kind, self._told = kind, told
        self.begun: list[float] = []
        self.tokens: list[int] = []

    def step(self, tokens: int) -> None:
        if self._kind == "cuda":
            import torch

            torch.cuda.synchronize()
        self._told()
        self.begun.append(time.perf_counter())
        self.tokens.append(tokens)

    def counted(self, warm_up: int) -> tuple[float, int]:
        """Seconds and tokens from behind the first steps to the last, which is not in it."""
        return self.begun[-1] - self.begun[warm_up], sum(self.tokens[warm_up:-1])


def _peak(kind: str) -> int:
    if kind == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    from edgedistill.answering import peak_memory_bytes

    return peak_memory_bytes()


def _ours(
    given: argparse.Namespace, rows: Sequence[Any], stop: int, scratch: Path, timed: Timed
) -> tuple[list[float | None], dict[str, Any]]:
    from edgedistill.distill.model import trained_model
    from edgedistill.methods import DistillSpec, LoraSpec
    from edgedistill.progress import Silent
    from edgedistill.torch_runtime import device
    from edgedistill.training.course import Course, Examined, Schedule
    from edgedistill.training.data import PART_TOKENS, plan_batches
    from edgedistill.training.learner import Learner, Packer, backward, nll_loss
    from edgedistill.training.trainer import train

    lora = LoraSpec(rank=given.rank, alpha=2 * given.rank)
    spec = DistillSpec(lora=lora, precision=given.precision, compile=given.only == COMPILED)
    epochs = given.steps * given.batch_size / len(rows)
    batches = plan_batches(rows, given.batch_size, epochs, 0)

    def built() -> Learner:
        made = Learner(trained_model(given.student, spec), nll_loss)
        if given.only == COMPILED:
            made.compile_layers()
        return made

    def step(model: Any, batch: Any, run: Any) -> Any:
        timed.step(sum(map(len, batches[len(timed.begun)])))
        return backward(model, batch, run, spec.precision)

    course = Course(
        batches=batches,
        batches_per_epoch=len(batches),
        schedule=Schedule(4e-4, 0.05, 0.0, 1, 1, 0),
        collate=Packer(PART_TOKENS[device().type]),
        build=built,
        backward=step,
        examine=lambda model: Examined(0.0),
        keep=lambda model, folder: None,
        choose=lambda points: points[-1].step,
    )
    done = train(course, scratch, Silent())
    flops = _flops(given.student, batches[given.warm_up : -1])
    return [point.loss for point in done.points], flops


def _flops(student: Path, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Figures of a GPU, each of the seconds that the batches took."""
    from edgedistill.torch_runtime import device
    from edgedistill.training.flops import model_flops, peak_of
    from edgedistill.training.need import dimensions

    if device().type != "cuda":
        return {}
    import torch

    peak = peak_of(torch.cuda.get_device_name())
    done = model_flops(dimensions(student), batches, whole=False)
    told: dict[str, Any] = {"model_flops_per_second": lambda seconds: done / seconds}
    return told | ({"utilisation": lambda seconds: done / seconds / peak} if peak else {})


def _trl(
    given: argparse.Namespace, rows: Sequence[Any], stop: int, scratch: Path, timed: Timed
) -> tuple[list[float | None], dict[str, Any]]:
    import torch
    from datasets import Dataset  # type: ignore[import-not-found,unused-ignore]
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
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

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            timed.step(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
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
        **{"max_length": given.length, **TRL[given.only]},
    )
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    model = load_model(given.student).to(dtype)
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(told),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=given.rank,
            lora_alpha=2 * given.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {}


def _rows_a_step(given: argparse.Namespace, rows: Sequence[Any]) -> int:
    """A packed sequence holds many rows: as many tokens a step as the others have."""
    if "packed" not in given.only:
        return int(given.batch_size)
    length = statistics.fmean(map(len, rows))
    return max(1, int(given.batch_size * length / given.length + 0.5))


if __name__ == "__main__":
    main()
