"""What several test files share: the command line in this process, and a small valid recipe."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgedistill.cli import main

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: the
# tests that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RECIPE = """\
name: tiny
description: Says whether a message is urgent.
prompts: prompts.jsonl
teacher:
  kind: api
  base_url: http://127.0.0.1:9/v1
  model: some-model
  licence: Apache-2.0
check:
  kind: label
  labels: [urgent, normal]
student:
  weights: smollm2-135m-instruct-q4_1
  max_tokens: 8
"""
TARGET = """\
name: small
description: A small device.
device_class: board
runtime: llama.cpp
formats: [Q4_0, Q8_0]
latency: measured
memory_budget_mb: 300
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command as the shell would, in this process."""

    def run(*words: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(here: Path) -> Path:
    """`recipes/tiny` and `targets/small.yaml` in the current folder; returns the recipe's file."""
    home = here / "recipes" / "tiny"
    home.mkdir(parents=True)
    (home / "recipe.yaml").write_text(RECIPE, "utf-8")
    prompts = [{"id": f"p-{n}", "prompt": f"message number {n}"} for n in range(20)]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (home / "prompts.jsonl").write_text(lines, "utf-8")
    (here / "targets").mkdir()
    (here / "targets" / "small.yaml").write_text(TARGET, "utf-8")
    return home / "recipe.yaml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no GPU; torch is loaded only to find out."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
