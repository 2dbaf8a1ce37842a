from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_student

from edgedistill.bench.in_browser import BrowserStep, bounds, not_measured
from edgedistill.bench.models import Model, Recorded
from edgedistill.check_specs import TextCheck
from edgedistill.checks import make_checker
from edgedistill.errors import RuntimeFailure
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Silent, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import BenchSpec, StudentSpec
from edgedistill.results import InBrowser
from edgedistill.runtime import Generation
from edgedistill.target import TargetGates

ROWS = [EvalRow(f"p{i}", f"prompt {i}", "the on", "a phrasing", True) for i in range(6)]
NATIVE = {row.id: "the on" if row.id != "p1" else "in" for row in ROWS}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> StudentPrompt:
    made = tiny_student(tmp_path_factory.mktemp("student"))
    return StudentPrompt(made.folder, StudentSpec(weights="x"))


@dataclass
class FakePage:
    """A page that answers with the prompt's own words for it, and logits with a little noise."""

    prompt: StudentPrompt
    answer: str = "the on"
    noise: float = 0.0
    misreads: bool = False
    dies_after: int = 99
    asked: list[str] = field(default_factory=list)
    infinite: int = 0  # prompts whose first probability is not finite

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"n_vocab": self.prompt.vocab_size, "llama_cpp": "b1", "user_agent": "Some/1"}

    def render(self, prompt: str) -> str:
        return self.prompt.render(prompt)

    def tokenize(self, text: str) -> list[int]:
        return self.prompt.encode(text) + [0] * self.misreads

    def generate(self, ids: list[int], max_tokens: int, stop_ids: frozenset[int]) -> Generation:
        if len(self.asked) > self.dies_after:
            raise RuntimeFailure("the browser died")
        self.asked.append(self.prompt.decode(ids))
        return Generation([1, 2, 3], f" {self.answer}\n", True, 0.5, 1.5, 1.0)

    def logits(self, ids: list[int], first: int, into: Path) -> list[int]:
        rows = table(len(ids) - first, self.prompt.vocab_size)
        rows += self.noise * np.random.default_rng(len(ids)).normal(size=rows.shape)
        rows[0, 0] = np.nan if self.infinite > 0 else rows[0, 0]
        self.infinite -= 1
        with into.open("ab") as stream:
            stream.write(rows.astype(np.float32).tobytes())
        return [int(token) for token in rows.argmax(1)]

    def peak_memory_bytes(self) -> int | None:
        return 10


def table(rows: int, vocabulary: int) -> Any:
    return np.random.default_rng(0).normal(size=(rows, vocabulary))


@dataclass
class Native:
    prompt: StudentPrompt

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        raise AssertionError("its answers are known")

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        count = 0
        with into.open("ab") as stream:
            for row in rows:
                made = table(len(self.prompt.answer_ids(row.answer)), self.prompt.vocab_size)
                stream.write(made.astype(np.float32).tobytes())
                count += len(made)
        return Recorded(count, [], 0.5)


def step(page: FakePage, resume: Path, prompts: int = 6) -> BrowserStep:
    @contextlib.contextmanager
    def opened() -> Iterator[FakePage]:
        yield page

    @contextlib.contextmanager
    def native() -> Iterator[Native]:
        yield Native(page.prompt)

    return BrowserStep(
        opened, Model("quantized", native), page.prompt, 12,
        BenchSpec(browser_prompts=prompts, bootstrap=100), TargetGates(max_mean_kld=0.01),
        make_checker(TextCheck(kind="exact")), resume,
    )  # fmt: skip


def test_it_tells_what_differs_from_llama_cpp(prompt: StudentPrompt, tmp_path: Path) -> None:
    found = step(FakePage(prompt, noise=0.01), tmp_path).measure(ROWS, NATIVE, Silent())
    made = found.step
    assert (made.prompts, made.misread) == (6, 0)
    assert made.same_answers is not None
    assert made.same_answers.value == pytest.approx(5 / 6)
    assert made.agreement is not None
    assert made.agreement.value == 1
    assert made.kld is not None
    assert 0 < made.kld["mean_kld"] < 1e-3
    assert made.kld["tokens"] == sum(len(prompt.answer_ids(row.answer)) for row in ROWS)
    (latency,) = found.latencies
    assert (latency.who, latency.prompts, latency.tokens_per_second.p50) == (
        "student in the browser", 6, 2.0,
    )  # fmt: skip
    assert all(gate.passed for gate in found.gates)
    assert not list(tmp_path.glob("*.f32"))


def test_a_killed_run_goes_on_behind_the_last_prompt(prompt: StudentPrompt, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure):
        step(FakePage(prompt, dies_after=3), tmp_path).measure(ROWS, NATIVE, Silent())
    page = FakePage(prompt)
    found = step(page, tmp_path).measure(ROWS, NATIVE, Silent())
    assert len(page.asked) == 1 + 3  # a warm-up, and what was left
    assert (found.step.prompts, found.latencies[0].reused) == (6, 3)
    again = FakePage(prompt)
    assert step(again, tmp_path).measure(ROWS, NATIVE, Silent()).step == found.step
    assert again.asked == []


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"misreads": True}, "browser_misread"),
        ({"noise": 1.0}, "mean_kld"),
        ({"answer": "other"}, "agreement_drop"),
    ],
)
def test_what_a_browser_changes_breaks_a_gate(
    change: dict[str, Any], gate: str, prompt: StudentPrompt, tmp_path: Path
) -> None:
    found = step(FakePage(prompt, **change), tmp_path).measure(ROWS, NATIVE, Silent())
    assert [g.name for g in found.gates if not g.passed] == [gate]


@pytest.mark.parametrize(("infinite", "measured"), [(1, True), (6, False)])
def test_probabilities_that_overflowed_are_counted(
    prompt: StudentPrompt, tmp_path: Path, infinite: int, measured: bool
) -> None:
    found = step(FakePage(prompt, infinite=infinite), tmp_path).measure(ROWS, NATIVE, Silent())
    assert found.step.overflowed == infinite
    assert (found.step.kld is not None) == measured
    assert ("mean_kld" in {gate.name for gate in found.gates}) == measured


def test_one_prompt_is_no_loss_of_agreement(prompt: StudentPrompt, tmp_path: Path) -> None:
    made = step(FakePage(prompt), tmp_path, prompts=2).measure(ROWS, NATIVE, Silent()).step
    (drop,) = [g for g in bounds(made, TargetGates()) if g.name == "agreement_drop"]
    assert drop.bound == 0.5


def test_a_slow_browser_breaks_a_speed_gate(prompt: StudentPrompt, tmp_path: Path) -> None:
    gates = TargetGates(min_tokens_per_second=3)  # the page does 2
    found = replace(step(FakePage(prompt), tmp_path), gates=gates).measure(ROWS, NATIVE, Silent())
    assert [g.name for g in found.gates if not g.passed] == ["tokens_per_second"]


def test_no_browser_is_said_and_nothing_is_gated() -> None:
    found = not_measured("there is none")
    assert found.step == InBrowser(
        False, "there is none", found.step.runtime, "", 0, 0, None, None, None, None, 0
    )
    assert (found.latencies, found.gates) == ([], [])
