from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from edgedistill.artifacts import Allocation, Checkpoint, Exported, Report, Variant
from edgedistill.bench import require_gates
from edgedistill.bench.agreement import agreement, answer_all, bootstrap, examples
from edgedistill.bench.chain import (
    STEPS,
    Change,
    Step,
    bounds,
    link,
    measure_chain,
    recorded,
    steps_of,
)
from edgedistill.bench.gates import (
    at_least,
    at_most,
    failure,
    refused_by,
    with_clock,
    without_clock,
)
from edgedistill.bench.latency import (
    Asker,
    Timing,
    choose,
    in_turn,
    llama_bench,
    peak_memory,
    spread,
    summary,
)
from edgedistill.bench.models import Model, Recorded, Runs
from edgedistill.errors import GateFailed, RuntimeFailure, TeacherError
from edgedistill.fidelity import EvalRow, Kld, rows_that_fit
from edgedistill.progress import Silent, Task
from edgedistill.recipe import RecipeGates
from edgedistill.results import Candidate, Link, LlamaBench
from edgedistill.target import Target, TargetGates
from edgedistill.teacher.client import Call, Trace

VOCAB = 8


def row(number: int, seen: bool = True) -> EvalRow:
    return EvalRow(f"p{number}", f"prompt {number}", f"answer {number}", "a phrasing", seen)


ROWS = [row(i, seen=i % 2 == 0) for i in range(10)]


@dataclass
class FakeRuns:
    """A model whose logits are noise around a fixed table; it answers with its own name."""

    name: str
    noise: float = 0.0
    vocab: int = VOCAB
    columns: Sequence[int] | None = None

    def answer(self, rows: Sequence[EvalRow], task: Task) -> list[str]:
        task.advance(len(rows))
        return [f"{self.name} {row.id}" for row in rows]

    def record(self, rows: Sequence[EvalRow], into: Path, task: Task) -> Recorded:
        table = np.random.default_rng(0).normal(size=(2 * len(rows), self.vocab))
        table += self.noise * np.random.default_rng(1).normal(size=table.shape)
        table = table if self.columns is None else table[:, self.columns]
        with into.open("ab") as stream:
            stream.write(table.astype(np.float32).tobytes())
        return Recorded(len(table), [row.id for row in rows[::2]], 0.5)


@dataclass
class FakeModels:
    """Models by name; counts how often each was loaded, and how many were at once."""

    runs: dict[str, Runs]
    loaded: list[str] = field(default_factory=list)
    now: int = 0
    most: int = 0

    def model(self, name: str) -> Model:
        @contextlib.contextmanager
        def opened() -> Iterator[Runs]:
            self.loaded.append(name)
            self.now += 1
            self.most = max(self.most, self.now)
            yield self.runs[name]
            self.now -= 1

        return Model(name, opened)

    def all(self) -> dict[str, Model]:
        return {name: self.model(name) for name in self.runs}


def chain_of(noise: Sequence[float] = (0.0, 0.0, 0.001, 0.1)) -> FakeModels:
    names = ("adapter", "merged", "exported", "quantized")
    return FakeModels({n: FakeRuns(n, x) for n, x in zip(names, noise, strict=True)})


# agreement


def test_bootstrap_of_a_coin_has_the_binomial_interval() -> None:
    interval = bootstrap([True, False] * 50, resamples=20_000, seed=0)
    assert (interval.value, interval.n) == (0.5, 100)
    # a binomial of n = 100, p = 0.5: 2.5 % and 97.5 % quantiles at 40 and 60
    assert (interval.low, interval.high) == pytest.approx((0.40, 0.60), abs=0.011)


def test_bootstrap_is_seeded() -> None:
    flags = [True] * 30 + [False] * 7
    assert bootstrap(flags, 500, seed=3) == bootstrap(flags, 500, seed=3)
    assert bootstrap(flags, 500, seed=3) != bootstrap(flags, 500, seed=4)


def test_all_or_none_has_the_exact_interval() -> None:
    # 10 of 10, 95 %: 0.6915 (Clopper-Pearson tables)
    everyone, nobody = bootstrap([True] * 10, 500, seed=0), bootstrap([False] * 10, 500, seed=0)
    assert (everyone.low, everyone.high) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert (nobody.low, nobody.high) == (0.0, pytest.approx(0.3085, abs=1e-4))


def test_agreement_is_apart_for_seen_and_unseen_phrasing() -> None:
    same = {r.id: r.seen for r in ROWS}
    found = agreement("merged", ROWS, same, 200, 0)
    assert found.overall.value == 0.5
    assert found.seen is not None
    assert found.unseen is not None
    assert (found.seen.value, found.unseen.value) == (1, 0)
    assert (found.seen.n, found.unseen.n) == (5, 5)
    assert agreement("merged", ROWS[:1], same, 200, 0).unseen is None


def test_answers_are_kept_and_no_model_is_loaded_twice(tmp_path: Path) -> None:
    models = FakeModels({name: FakeRuns(name) for name in ("base", "merged")})
    first = answer_all([models.model("base")], ROWS, {}, tmp_path, Silent())
    both = answer_all(list(models.all().values()), ROWS, {}, tmp_path, Silent())
    assert models.loaded == ["base", "merged"]
    assert models.most == 1
    assert both["base"] == first["base"]
    assert both["merged"]["p3"] == "merged p3"


def test_a_prompt_that_a_model_followed_is_not_asked_again(tmp_path: Path) -> None:
    models = chain_of()
    measure_chain(models.all(), ROWS, tmp_path, Silent())
    followed = recorded(tmp_path, "merged").followed
    assert followed == [row.id for row in ROWS[::2]]
    answers = answer_all([models.model("merged")], ROWS, {"merged": followed}, tmp_path, Silent())
    assert answers["merged"] == {
        row.id: row.answer if row.id in followed else f"merged {row.id}" for row in ROWS
    }


def test_examples_show_disagreements_first_and_mix_phrasings() -> None:
    same = {r.id: int(r.id[1:]) >= 4 for r in ROWS}
    answers = {r.id: "an answer" for r in ROWS}
    shown = examples(ROWS, answers, same, 6)
    assert [example.same for example in shown] == [False] * 3 + [True] * 3
    assert {example.seen_phrasing for example in shown[:2]} == {True, False}
    assert shown == examples(list(reversed(ROWS)), answers, same, 6)
    assert len(examples(ROWS, answers, same, 20)) == 10
    assert [e.same for e in examples(ROWS, answers, dict.fromkeys(same, False), 6)] == [False] * 6


# fidelity chain


def test_chain_measures_each_step_and_clears_its_scratch_files(tmp_path: Path) -> None:
    models = chain_of()
    found = measure_chain(models.all(), ROWS, tmp_path, Silent())
    assert found["merge"].kld.mean_kld == pytest.approx(0, abs=1e-12)
    assert 0 < found["export"].kld.mean_kld < found["quantize"].kld.mean_kld
    assert found["quantize"].kld.tokens == 20
    assert models.loaded == ["adapter", "merged", "exported", "quantized"]
    assert not list(tmp_path.glob("*.f32"))


def test_a_killed_chain_goes_on_with_the_step_it_was_in(tmp_path: Path) -> None:
    broken = chain_of()
    broken.runs["quantized"] = FakeRuns("quantized", vocab=VOCAB + 1)
    with pytest.raises(RuntimeFailure, match="quantize"):
        measure_chain(broken.all(), ROWS, tmp_path, Silent())
    (tmp_path / "logits-quantized.f32").unlink()
    models = chain_of()
    found = measure_chain(models.all(), ROWS, tmp_path, Silent())
    assert models.loaded == ["quantized"]
    assert found == measure_chain(chain_of().all(), ROWS, tmp_path / "afresh", Silent())


def test_rows_are_capped_by_id_and_not_by_place() -> None:
    class Prompt:
        vocab_size = 100

        def answer_ids(self, answer: str) -> list[int]:
            return [0] * 5

    prompt = Prompt()
    kept = rows_that_fit(ROWS, prompt, limit=3 * 5 * 100 * 4)  # type: ignore[arg-type]
    again = rows_that_fit(ROWS[::-1], prompt, limit=3 * 5 * 100 * 4)  # type: ignore[arg-type]
    assert len(kept) == 3
    assert {r.id for r in kept} == {r.id for r in again}
    assert rows_that_fit(ROWS, prompt) == ROWS  # type: ignore[arg-type]


def linked(name: str, kld: float, gates: TargetGates | None = None) -> Link:
    step = next(step for step in STEPS if step.name == name)
    measured = Change(Kld(kld, kld, kld, 1.0, 9), 0.02, 0.02)
    return link(step, measured, SHARES, RecipeGates(), gates or TargetGates())


SHARES = {"adapter": 0.9, "merged": 0.9, "exported": 0.89, "quantized": 0.87}


@pytest.mark.parametrize(
    ("step", "kld", "passed"),
    [
        ("merge", 1e-7, True),
        ("merge", 2e-6, False),
        ("export", 5e-5, True),
        ("export", 2e-4, False),
        ("quantize", 0.5, True),
        ("export", float("nan"), False),
    ],
)
def test_a_link_is_held_against_the_bounds_of_its_step(step: str, kld: float, passed: bool) -> None:
    made = linked(step, kld)
    assert made.passed is passed
    assert made.agreement_after == SHARES[made.after]


def test_a_loss_of_exactly_the_bound_passes() -> None:
    def passed(bound: float) -> bool:
        gates = TargetGates(max_agreement_drop=bound)
        return linked("quantize", 0, gates).passed

    assert passed(0.02)
    assert not passed(0.0199)
    assert bounds(STEPS[-1], RecipeGates(), TargetGates(max_p99_kld=0.4)) == {
        "p99_kld": 0.4,
        "agreement_drop": 0.02,
    }


def test_a_fitted_file_has_a_way_of_its_own() -> None:
    def way(trimmed: bool, fitted: bool) -> list[tuple[str, str, str]]:
        place = Checkpoint(Path(), "")
        allocation = Allocation(Path(), "", {}, None)
        exported, kept = Exported(Path(), "", Path()), [1, 2] if trimmed else None
        whole = place if trimmed else None
        variant = Variant("mine", place, whole, allocation, exported, fitted, kept)
        return [(step.name, step.before, step.after) for step in steps_of(variant)[2:]]

    assert way(False, False) == [("quantize", "exported", "quantized")]
    assert way(True, False) == [
        ("trim", "merged", "trimmed"),
        ("quantize", "trimmed", "quantized"),
    ]
    assert way(True, True) == [
        ("trim", "merged", "trimmed"),
        ("fit", "trimmed", "fitted"),
        ("quantize", "fitted", "quantized"),
    ]
    assert way(False, True)[0] == ("fit", "merged", "fitted")


@pytest.mark.parametrize(("rise", "passed"), [(0.04, True), (0.06, False)])
def test_fitting_is_held_to_the_teachers_text_and_not_to_kld(rise: float, passed: bool) -> None:
    step = Step("fit", "exported", "quantized")
    gates = TargetGates(max_mean_kld=1e-9)
    measured = Change(Kld(1, 1, 1, 1.0, 9), 0.02, 0.02 + rise)
    made = link(step, measured, SHARES, RecipeGates(), gates)
    assert made.passed is passed


def test_a_smaller_vocabulary_is_compared_on_what_it_kept(tmp_path: Path) -> None:
    """The same logits in fewer columns: what is kept predicts as before."""
    columns = [4, 0, 3]
    models = FakeModels(
        {"merged": FakeRuns("merged"), "trimmed": FakeRuns("trimmed", columns=columns)}
    )
    steps = [Step("trim", "merged", "trimmed", columns)]
    found = measure_chain(models.all(), ROWS, tmp_path, Silent(), steps)
    assert found["trim"].kld.mean_kld == pytest.approx(0, abs=1e-9)


# latency


def test_percentiles_by_hand() -> None:
    found = spread([float(i) for i in range(101)])
    assert (found.p50, found.p95, found.p99, found.mean) == (50, 95, 99, 50)
    assert spread([1.0, 2.0]).p95 == pytest.approx(1.95)
    assert spread([]).p50 == 0


@pytest.mark.parametrize(
    ("timing", "rate"),
    [
        (Timing(1.5, 0.5, 21), 20.0),
        (Timing(1.5, None, 21), None),
        (Timing(0.5, 0.5, 1), None),
    ],
)
def test_decode_rate_leaves_the_first_token_out(timing: Timing, rate: float | None) -> None:
    assert timing.tokens_per_second == rate


def test_summary_of_timings() -> None:
    found = summary("teacher", [Timing(1.0, 0.5, 11), Timing(3.0, 1.0, 21)], None, 7)
    assert found.end_to_end.p50 == 2.0
    assert found.time_to_first_token.mean == 0.75
    assert found.tokens_per_second.mean == pytest.approx(15)
    assert (found.answer_tokens_mean, found.end_to_end_seconds) == (16, [1.0, 3.0])


def test_one_more_prompt_changes_at_most_one_of_the_chosen() -> None:
    chosen = {r.id for r in choose(ROWS, 4, seed=1)}
    more = {r.id for r in choose([*ROWS, row(99)], 4, seed=1)}
    assert len(chosen & more) >= 3
    assert chosen != {r.id for r in choose(ROWS, 4, seed=2)}


@dataclass
class FakeServer:
    """Answers every call in `seconds`, or fails those in `refused`."""

    seconds: float
    refused: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)

    def stream(self, call: Call) -> Trace:
        self.asked.append(call.prompt_id)
        failure = "HTTP 500" if call.prompt_id in self.refused else None
        return trace_of(call, self.seconds, failure)


@dataclass
class FakeStore:
    kept: dict[str, Trace] = field(default_factory=dict)

    def get(self, key: str) -> Trace | None:
        return self.kept.get(key)

    def put(self, trace: Trace) -> None:
        self.kept[trace.key] = trace


def trace_of(call: Call, seconds: float, failure: str | None = None) -> Trace:
    return Trace(
        trace_id="t",
        key=call.key,
        prompt_id=call.prompt_id,
        purpose=call.purpose,
        model_asked=call.model,
        model_answered=call.model,
        prompt_version=call.prompt_version,
        parameters=call.parameters,
        prompt_tokens=5,
        completion_tokens=11,
        latency_seconds=seconds,
        time_to_first_token=seconds / 2,
        text="an answer",
        finish_reason="stop",
        top_logprobs=None,
        attempts=1,
        failure=failure,
        asked_at="2026-01-01T00:00:00Z",
    )


def call_of(row: EvalRow) -> Call:
    message = {"role": "user", "content": row.prompt}
    return Call(row.id, "a-model", (message,), {"temperature": 0}, "v1", "bench")


def asker(server: FakeServer, store: FakeStore | None = None) -> Asker:
    return Asker("teacher", server, call_of, store or FakeStore())


def test_both_answer_in_turn_and_a_failed_row_counts_for_neither() -> None:
    teacher, student = FakeServer(2.0), FakeServer(0.2, refused=frozenset({"p1"}))
    asked = asker(student)
    pairs = in_turn(asker(teacher), asked, ROWS[:3], Silent())
    assert [(first.seconds, second.seconds) for first, second in pairs] == [(2.0, 0.2)] * 2
    assert asked.failed == {"p1": "HTTP 500"}


def test_an_answered_call_is_not_asked_again() -> None:
    store, server = FakeStore(), FakeServer(1.0, refused=frozenset({"p1"}))
    in_turn(asker(server, store), asker(FakeServer(0.1)), ROWS[:2], Silent())
    second = asker(server, store)
    in_turn(second, asker(FakeServer(0.1)), ROWS[:3], Silent())
    assert server.asked == ["p0", "p1", "p1", "p2"]
    assert second.reused == 1


def test_nobody_answering_is_an_error_with_the_reason() -> None:
    silent = FakeServer(1.0, refused=frozenset(r.id for r in ROWS))
    with pytest.raises(TeacherError, match="HTTP 500"):
        in_turn(asker(silent), asker(FakeServer(0.1)), ROWS, Silent())
    with pytest.raises(TeacherError, match="warm-up"):
        asker(silent).warm_up(ROWS[0])


def test_llama_bench_gives_mean_and_sample_deviation() -> None:
    found = llama_bench({"pp": [100.0, 104.0], "tg": [50.0]}, threads=2)
    assert (found[0].test, found[0].mean) == ("pp512", 102.0)
    assert found[0].std == pytest.approx(8**0.5)
    assert (found[1].test, found[1].std, found[1].runs) == ("tg128", 0.0, 1)


def test_peak_memory_of_a_process_that_let_go_again() -> None:
    size = 60_000_000
    block = np.ones(size, np.uint8)
    del block
    peak = peak_memory(os.getpid())
    assert peak is not None
    assert peak > size
    assert peak_memory(2**22 + 1) is None


# gates


def target(**gates: float) -> Target:
    return Target(
        name="laptop",
        description="a laptop",
        device_class="laptop",
        runtime="llama.cpp",
        formats=("Q8_0",),
        latency="measured",
        memory_budget_mb=200,
        gates=TargetGates(**gates),
    )


def candidate(memory_mb: float) -> Candidate:
    size = int(memory_mb * 1e6)
    return Candidate("Q8_0", 1, 8.5, 0, 0, 1, 0.9, 0.9, size, True, "", True)


def test_every_bound_becomes_a_gate() -> None:
    links = [linked("quantize", 0.1)]
    found = without_clock(
        RecipeGates(merged_agreement=0.85),
        target(max_file_mb=100),
        0.9,
        links,
        [candidate(201), replace(candidate(900), chosen=False)],
        90_000_000,
    )
    assert [(gate.step, gate.name, gate.passed) for gate in found] == [
        ("distill", "merged_agreement", True),
        ("quantize", "agreement_drop", True),
        ("quantize", "file_mb", True),
        ("quantize", "memory_mb", False),
    ]


def test_a_speed_gate_exists_only_where_speed_was_measured() -> None:
    runs = [LlamaBench("pp512", 900, 1, 5, 2), LlamaBench("tg128", 90, 1, 5, 2)]
    (gate,) = with_clock(target(min_tokens_per_second=91), runs)
    assert (gate.measured, gate.passed) == (90, False)
    assert with_clock(target(min_tokens_per_second=91), []) == []
    assert with_clock(target(), runs) == []


def test_the_first_failed_step_is_named_with_all_figures(tmp_path: Path) -> None:
    gates = [
        at_least("bench", "tokens_per_second", 50, 40),
        at_most("export", "mean_kld", 1e-4, 0.2),
        at_least("distill", "merged_agreement", 0.85, 0.9),
    ]
    assert failure(gates[2:]) is None
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"gates": [vars(gate) for gate in gates]}))
    with pytest.raises(GateFailed, match=r"'export'.* 0\.2.*_second is 40") as caught:
        require_gates(Report(tmp_path, "digest", file))
    assert caught.value.step == "export"
    file.write_text(json.dumps({"gates": [vars(gates[2])]}))
    require_gates(Report(tmp_path, "digest", file))


def test_only_what_another_file_may_do_better_refuses_this_one() -> None:
    lost = at_most("quantize", "agreement_drop", 0.02, 0.0454545)
    far = at_most("aarch64", "mean_kld", 0.005, 0.0123)
    fine = at_most("quantize", "mean_kld", 0.005, 0.004)
    assert refused_by([fine]) == ""
    assert refused_by([lost, fine, far]) == (
        "quantize: agreement_drop is 0.0455, the bound is 0.02; "
        "aarch64: mean_kld is 0.0123, the bound is 0.005"
    )
    for step, name in (("distill", "merged_agreement"), ("bench", "tokens_per_second")):
        assert refused_by([lost, at_least(step, name, 0.9, 0.5)]) == ""
