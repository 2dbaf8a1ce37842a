"""The hand-over check of an optimum export, in ORTModelForCausalLM as an app would run it.

Tokens, chat template and end tokens by name first, then the KL divergence of every model file from
the merged checkpoint on real prompts and answers. Only the fp32 file has a bound here; what the
smaller ones lose is measured and kept, for whoever ships one to see.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.artifacts import (
    Checkpoint,
    Dataset,
    Exported,
    Identity,
    digest_of_file,
    run_stage,
    tool_versions,
)
from edgedistill.errors import DatasetError, GateFailed, RuntimeFailure
from edgedistill.export.optimum import CHILD, FORMATS, PINS, STEP_SECONDS
from edgedistill.fidelity import EvalRow, Kld, compare, read_rows, record
from edgedistill.handover import KLD_ROWS, chosen_rows, conversations, difference
from edgedistill.own_environment import OwnEnvironment, prepare, read_pins, run_script
from edgedistill.progress import Progress
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec


def check_optimum(
    checkpoint: Checkpoint,
    exported: Exported,
    dataset: Dataset,
    prompt: StudentSpec,
    max_mean_kld: float,
    out: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Stage "verify-optimum"; returns its facts: `texts_compared` and, in `kld`, the figures of
    each file by its dtype.

    Raises:
        GateFailed: step "export-optimum"; the message names what differs.
        MissingTool: the environment of optimum cannot be made.
    """
    pins = read_pins(PINS)
    identity = Identity(
        stage="verify-optimum",
        version=1,
        spec={
            "max_mean_kld": max_mean_kld,
            "rows": KLD_ROWS,
            "prompt": prompt.model_dump(mode="json", include={"system", "prompt"}),
        },
        inputs={
            "checkpoint": checkpoint.digest,
            "exported": exported.digest,
            "dataset": dataset.digest,
        },
        tools={
            **tool_versions("torch", "transformers", "tokenizers"),
            "environment": pins.digest,
            "script": digest_of_file(CHILD),
        },
    )

    def work(folder: Path) -> Mapping[str, Any]:
        student = StudentPrompt(checkpoint.folder, prompt)
        environment = prepare(pins, progress)
        task = _Handover(checkpoint.folder, exported.folder, student, environment, progress)
        return task.check(read_rows(dataset.folder / "validation.jsonl"), max_mean_kld, folder)

    return run_stage(identity, out, progress, work).facts


@dataclass(frozen=True)
class _Handover:
    checkpoint: Path
    exported: Path
    student: StudentPrompt
    environment: OwnEnvironment
    progress: Progress

    def check(self, rows: Sequence[EvalRow], bound: float, folder: Path) -> Mapping[str, Any]:
        if not rows:
            raise DatasetError("there are no validation rows to check the export on")
        self._same_files()
        compared = self._same_tokens(rows)
        chosen = chosen_rows(rows)
        found = self._kld([self._supervised(row) for row in chosen], folder)
        whole = found[FORMATS[0].dtype]
        if not whole.mean_kld <= bound:
            self._fail(
                f"mean KLD of merged to ONNX fp32 is {whole.mean_kld:.3g}, above the bound of "
                f"{bound:g} (over {whole.tokens} answer tokens): look at the hyperparameters"
            )
        for dtype, kld in found.items():
            self.progress.note(f"{dtype}: mean KLD {kld.mean_kld:.2g}, top-1 {kld.top1:.1%}")
        figures = {dtype: asdict(kld) for dtype, kld in found.items()}
        return {"kld": figures, "rows": len(chosen), "texts_compared": compared}

    def _fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise GateFailed("export-optimum", what, where=str(self.exported)) from cause

    def _ask(self, do: str, **given: Any) -> Any:
        request = {"do": do, "folder": str(self.exported), **given}
        try:
            return run_script(self.environment, CHILD, request, STEP_SECONDS)
        except RuntimeFailure as error:
            self._fail(f"the exported folder cannot be used: {error.what}", error)

    def _same_files(self) -> None:
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            if digest_of_file(self.exported / name) != digest_of_file(self.checkpoint / name):
                self._fail(f"{name} is not the one training used")

    def _same_tokens(self, rows: Sequence[EvalRow]) -> int:
        """transformers 4 on the exported folder: the same text and IDs as in training."""
        talks = [self.student.messages(row.prompt, row.history) for row in rows]
        talks += [talk for _, talk, _ in conversations()]
        asks = [talk[-1]["role"] == "user" for talk in talks]
        rendered = [self.student.render_messages(*pair) for pair in zip(talks, asks, strict=True)]
        asked = [
            {"conversation": talk, "add_generation_prompt": ask}
            for talk, ask in zip(talks, asks, strict=True)
        ]
        texts = [*rendered, *(row.answer for row in rows)]
        said = self._ask("tokens", texts=texts, talks=asked)
        if set(said["ends"]) != self.student.stop_ids:
            self._fail(
                f"it ends answers at {sorted(said['ends'])}, but training taught the student to "
                f"stop with {sorted(self.student.stop_ids)}"
            )
        for own, other in zip(rendered, said["rendered"], strict=True):
            if own != other:
                self._fail(f"its chat template gives {other!r} instead of {own!r}")
        for text, found in zip(texts, said["ids"], strict=True):
            if (wanted := self.student.encode(text)) != found:
                self._fail(f"token IDs of {text[:60]!r} differ {difference(wanted, found)}")
        return len(texts)

    def _supervised(self, row: EvalRow) -> tuple[list[int], int]:
        asked = self.student.prompt_ids(row.prompt, row.history)
        return asked + self.student.answer_ids(row.answer), len(asked)

    def _kld(self, rows: Sequence[tuple[list[int], int]], folder: Path) -> dict[str, Kld]:
        from edgedistill.torch_runtime import TorchModel

        before, after, found = folder / "merged.f32", folder / "exported.f32", {}
        model = TorchModel(self.checkpoint)
        with self.progress.task("logits of merged", len(rows), "prompts") as task:
            for logits in model.logits(rows):
                record([logits], before)
                task.advance()
        del model
        gc.collect()
        with self.progress.task("logits of ONNX", len(FORMATS), "files") as task:
            for format in FORMATS:
                self._ask("logits", file=format.file, rows=rows, into=str(after))
                found[format.dtype] = compare(before, after, self.student.vocab_size)
                after.unlink()
                task.advance()
        before.unlink()
        return found
