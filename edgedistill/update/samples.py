"""Answers that travel with an update, so that a device can show that it gives the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import Finished
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec
from edgedistill.runtime import LlamaCpp
from edgedistill.runtimes import Runtime, asked_ids
from edgedistill.update.contents import Contents, Sample


def ask(bundle: Finished, count: int) -> list[Sample]:
    """The bundle's own answers to the first `count` examples of its report."""
    from edgedistill.student import read_tokenizer_keys, write_tokenizer

    report = json.loads((bundle.folder / "report.json").read_text("utf-8"))
    spec = StudentSpec(**bundle.manifest["spec"]["recipe"]["student"])
    model = bundle.folder / bundle.facts["model"]
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), read_tokenizer_keys(model))
        student = StudentPrompt(Path(folder), spec)
        prompts = [student.render(row["prompt"]) for row in report["examples"][:count]]
    longest, context = spec.max_tokens, _context(prompts, spec.max_tokens)
    adapter = _adapter(bundle.folder, bundle.facts)
    with LlamaCpp(model, context_tokens=context, adapter=adapter) as runtime:
        return [
            Sample(prompt=prompt, max_tokens=longest, answer=_answer(runtime, prompt, longest))
            for prompt in prompts
        ]


def compare(folder: Path, contents: Contents) -> int:
    """How many samples the bundle in `folder` answers exactly as the update says."""
    adapter, asked = _adapter(folder, {"adapter": contents.adapter}), contents.samples
    context = _context(
        [sample.prompt for sample in asked], max((sample.max_tokens for sample in asked), default=0)
    )
    with LlamaCpp(folder / contents.model, context_tokens=context, adapter=adapter) as runtime:
        return sum(
            _answer(runtime, sample.prompt, sample.max_tokens) == sample.answer
            for sample in contents.samples
        )


def _context(prompts: Sequence[str], max_tokens: int) -> int:
    """Enough for all of them: no tokenizer makes more tokens of a text than it has bytes, but for
    a few of its own around them."""
    return max((len(prompt.encode()) for prompt in prompts), default=0) + max_tokens + 8


def _adapter(folder: Path, facts: Mapping[str, Any]) -> Path | None:
    name = facts.get("adapter")
    return None if name is None else folder / str(name)


def _answer(runtime: Runtime, prompt: str, max_tokens: int) -> str:
    ids = asked_ids(runtime, prompt)
    return str(runtime.generate(ids, max_tokens, runtime.end_ids()).text)
