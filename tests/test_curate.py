"""Curation: every reason to reject, and what the split promises."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.artifacts import Dataset, TokenMixEntry, Traces, digest_of
from edgedistill.curate import REASONS, Row, Split, curate, split
from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.fidelity import read_rows
from edgedistill.progress import Silent
from edgedistill.recipe import CurateSpec, SplitSpec, TextCheck
from edgedistill.tokenmix import TokenMix, normalised

PARTS = ("train", "validation", "held_out")
CHECK = TextCheck(kind="json")


class Told(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def entry(name: str, prompt: str | None = None, *, tag: str | None = None) -> TokenMixEntry:
    messages = ({"role": "user", "content": prompt or f"prompt {name}"},)
    return TokenMixEntry(name, messages, tags=(f"phrasing:{tag}",) if tag else ())


def trace(name: str, text: str = "1", **changes: Any) -> dict[str, Any]:
    plain = {"finish_reason": "stop", "failure": None, "text": text}
    return {"trace_id": f"t-{name}", "prompt_id": name, "latency_seconds": 1.5, **plain, **changes}


def chat(name: str, *said: str) -> TokenMixEntry:
    roles = ("user", "assistant")
    return TokenMixEntry(
        name, tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(said))
    )


def many(count: int, phrasings: int) -> list[TokenMixEntry]:
    return [entry(f"p{n}", tag=f"f{n % phrasings}") for n in range(count)]


def run(
    folder: Path,
    entries: list[TokenMixEntry],
    traces: list[dict[str, Any]] | None = None,
    spec: CurateSpec | None = None,
    told: Silent | None = None,
) -> Dataset:
    folder.mkdir(exist_ok=True)
    asked = [trace(e.id) for e in entries] if traces is None else traces
    file = folder / "traces.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in asked), "utf-8")
    mix = TokenMix(tuple(entries), digest_of([[e.id, e.prompt] for e in entries]))
    answers = Traces(folder, digest_of([line["text"] for line in asked]), file, len(asked), 0)
    return curate(answers, mix, spec or CurateSpec(), CHECK, folder, told or Silent())


def lines(dataset: Dataset, part: str) -> list[dict[str, Any]]:
    return [
        json.loads(s)
        for s in (dataset.folder / f"{part}.jsonl").read_text("utf-8").split("\n")
        if s
    ]


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (trace("x", "", failure="5 attempts: HTTP 500"), "failed", "HTTP 500"),
        (trace("other"), "failed", "no trace"),
        (trace("x", " \n"), "empty", "nothing is left"),
        (trace("x", "```\n```"), "empty", "nothing is left"),
        (trace("x", "[1, 2", finish_reason="length"), "truncated", "max_tokens"),
        (trace("x", "I\N{RIGHT SINGLE QUOTATION MARK}M SORRY, but"), "refused", "i'm sorry"),
        (trace("x", '"' + "a" * 4000 + '"'), "too-long", "4002 characters; 4000"),
        (trace("x", "{nope"), "invalid", "not JSON"),
    ],
)
def test_each_rejected_trace_keeps_its_reason(
    tmp_path: Path, bad: dict[str, Any], reason: str, detail: str
) -> None:
    entries = [*many(30, 10), entry("x")]
    traces = [*(trace(e.id) for e in entries[:-1]), bad]
    dataset = run(tmp_path, entries, traces)
    (row,) = lines(dataset, "rejected")
    assert (row["id"], row["prompt"], row["reason"]) == ("x", "prompt x", reason)
    assert detail in row["detail"]
    assert row["trace_id"] == ("t-x" if bad["prompt_id"] == "x" else None)
    assert (dataset.rejected, dataset.train + dataset.validation + dataset.held_out) == (1, 30)


def test_first_usable_of_equal_prompts_is_kept(tmp_path: Path) -> None:
    same = [entry("x1", "How many?"), entry("x2", "how  many"), entry("x3", "HOW MANY!")]
    entries = [*many(30, 10), *same]
    traces = [trace(e.id, "" if e.id == "x1" else "1") for e in entries]
    rejected = {row["id"]: row for row in lines(run(tmp_path, entries, traces), "rejected")}
    assert {name: row["reason"] for name, row in rejected.items()} == {
        "x1": "empty",
        "x3": "duplicate",
    }
    assert "x2" in rejected["x3"]["detail"]


def test_conversations_that_end_alike_are_not_the_same(tmp_path: Path) -> None:
    chats = [
        chat("a", "refund me", "sure?", "yes"),
        chat("b", "cancel me", "sure?", "yes"),
        chat("c", "Refund me!", "sure?", "Yes."),
    ]
    made = run(tmp_path, [*chats, *many(20, 5)])
    assert made.rejected == 1
    rows = [row for part in PARTS for row in lines(made, part)]
    kept = {row["id"]: row["history"] for row in rows if row["id"] in "abc"}
    assert kept["a"] == list(chats[0].messages[:-1])
    assert set(kept) == {"a", "b"}


def test_rows_hold_the_cleaned_answer_and_their_provenance(tmp_path: Path) -> None:
    entries = [replace(e, weight=2.0, reference="ref") for e in many(30, 10)]
    dataset = run(tmp_path, entries, [trace(e.id, "```json\n[1]\n```") for e in entries])
    row = lines(dataset, "train")[0]
    name = row["id"]
    assert row == {
        "id": name,
        "prompt": f"prompt {name}",
        "answer": "[1]",
        "phrasing": f"f{int(name[1:]) % 10}",
        "seen": True,
        "weight": 2.0,
        "tags": [f"phrasing:f{int(name[1:]) % 10}"],
        "trace_id": f"t-{name}",
        "reference": "ref",
        "history": [],
        "score": 1.0,
    }


@pytest.mark.parametrize(("score", "rejected"), [(0.25, 0), (0.0, 15)])
def test_an_answer_that_is_not_the_reference_counts_less(
    tmp_path: Path, score: float, rejected: int
) -> None:
    entries = [replace(e, reference=str(at % 2)) for at, e in enumerate(many(30, 10))]
    spec = CurateSpec(contradicted_score=score)
    made = run(tmp_path, entries, [trace(e.id, "1") for e in entries], spec)
    assert made.rejected == rejected
    rows = [row for part in PARTS for row in lines(made, part)]
    assert {row["score"] for row in rows if row["reference"] == "1"} == {1.0}
    assert {row["score"] for row in rows if row["reference"] == "0"} == {score} - {0.0}
    read = read_rows(made.folder / "train.jsonl")
    assert all(row.weight == (1.0 if row.reference == "1" else score) for row in read)


def test_facts_count_everything(tmp_path: Path) -> None:
    entries = many(100, 20)
    dataset = run(tmp_path, entries, [trace(e.id, "" if e.id == "p7" else "1") for e in entries])
    facts = json.loads((dataset.folder / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["rejected_by_reason"] == {**dict.fromkeys(REASONS, 0), "empty": 1}
    assert facts["train"] + facts["validation"] + facts["held_out"] == 99
    assert facts["held_out_seen"] == sum(row["seen"] for row in lines(dataset, "held_out"))
    assert facts["held_out_seen"] + facts["held_out_unseen"] == facts["held_out"]


def test_same_input_gives_the_same_bytes_in_token_mix_order(tmp_path: Path) -> None:
    entries = many(60, 15)
    one, two = run(tmp_path / "one", entries), run(tmp_path / "two", entries)
    assert one.digest == two.digest
    ids = [row["id"] for row in lines(one, "train")]
    assert ids == [e.id for e in entries if e.id in set(ids)]


def test_why_a_call_failed_does_not_change_the_digest(tmp_path: Path) -> None:
    entries = many(60, 15)
    digests = set()
    for why in ("HTTP 500", "timeout"):
        traces = [trace(e.id, failure=why if e.id == "p3" else None) for e in entries]
        dataset = run(tmp_path / why.replace(" ", "-"), entries, traces)
        assert lines(dataset, "rejected")[0]["detail"] == why
        digests.add(dataset.digest)
    assert len(digests) == 1


def test_finished_stage_is_reused(tmp_path: Path) -> None:
    class Counting(Silent):
        def __init__(self) -> None:
            self.reused: list[bool] = []

        def stage(self, name: str, folder: Path, *, reused: bool) -> None:
            self.reused.append(reused)

    told = Counting()
    first = run(tmp_path, many(30, 10), told=told)
    assert run(tmp_path, many(30, 10), told=told) == first
    assert run(tmp_path, many(30, 10), spec=CurateSpec(max_answer_chars=9), told=told) != first
    assert told.reused == [False, True, False]


def test_too_little_left_says_what_was_rejected(tmp_path: Path) -> None:
    entries = many(10, 5)
    traces = [trace("p0", failure="timeout"), *(trace(e.id, "I cannot") for e in entries[1:])]
    with pytest.raises(DatasetError) as caught:
        run(tmp_path, entries, traces)
    assert "0 of 10 prompts are usable" in str(caught.value)
    assert "1 failed, 9 refused" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}\n", "[]\n"])
def test_broken_traces_are_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(ArtifactError, match="traces cannot be read"):
        curate(
            Traces(tmp_path, "d", file, 1, 0),
            TokenMix((entry("x"),), "m"),
            CurateSpec(),
            CHECK,
            tmp_path,
            Silent(),
        )


@pytest.mark.parametrize(
    ("phrasings", "note"),
    [(100, "no phrasing repeats"), (1, "too few phrasings"), (20, None)],
)
def test_kind_of_held_out_prompts_that_cannot_be_had_is_noted(
    tmp_path: Path, phrasings: int, note: str | None
) -> None:
    told = Told()
    run(tmp_path, many(100, phrasings), told=told)
    counts, *others = told.notes
    assert counts.startswith("70 prompts to train on, 10 to choose by, 20 to measure with; 0")
    assert counts.endswith("figures are little more than chance")  # 10 are few
    assert len(others) == (note is not None)
    assert all(note in text for text in others if note)


def row(name: str, phrasing: str) -> Row:
    return Row(name, f"prompt {name}", "1", phrasing, False, 1.0, (), f"t-{name}", None)


def rows(count: int, phrasings: int) -> list[Row]:
    return [row(f"p{n}", f"f{n % phrasings}") for n in range(count)]


def placed(parts: Split) -> dict[str, str]:
    return {row.id: name for name in PARTS for row in getattr(parts, name)}


@given(
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=30),
    held_out=st.sampled_from([0.1, 0.2, 0.4]),
    validation=st.sampled_from([0.05, 0.1, 0.3]),
    unseen=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_split_keeps_its_promises(
    sizes: list[int], held_out: float, validation: float, unseen: float, seed: int
) -> None:
    given_rows = [row(f"{f} and {n}", f"f{f}") for f, size in enumerate(sizes) for n in range(size)]
    spec = SplitSpec(validation=validation, held_out=held_out, unseen_phrasings=unseen, seed=seed)
    parts = split(given_rows, spec)
    assert Counter(placed(parts).values()).total() == len(given_rows)
    learnt = {row.phrasing for row in parts.train}
    others = learnt | {row.phrasing for row in parts.validation}
    assert all(row.seen for row in parts.train)
    for held in parts.held_out:
        assert held.seen is (held.phrasing in learnt)
        assert held.seen or held.phrasing not in others
    prompts = {normalised(row.prompt) for row in (*parts.train, *parts.validation)}
    assert not prompts & {normalised(row.prompt) for row in parts.held_out}
    wanted = held_out * len(given_rows)
    assert abs(len(parts.held_out) - wanted) <= max(sizes)
    new = sum(not row.seen for row in parts.held_out)
    if wanted * unseen >= max(sizes) and max(sizes) > 1 and unseen < 1:
        assert new >= wanted * unseen - max(sizes)


@pytest.mark.parametrize("unseen", [0.0, 0.5, 1.0])
def test_counts_come_out_as_asked(unseen: float) -> None:
    parts = split(rows(500, 150), SplitSpec(unseen_phrasings=unseen))
    assert abs(len(parts.held_out) - 100) <= 2
    assert len(parts.validation) == 50
    assert abs(sum(not row.seen for row in parts.held_out) - 100 * unseen) <= 2


def test_another_seed_gives_another_split() -> None:
    one, two = (split(rows(200, 50), SplitSpec(seed=seed)) for seed in (0, 1))
    assert placed(one) != placed(two)


@pytest.mark.parametrize("change", ["add", "add a phrasing", "remove", "reword"])
def test_one_change_moves_few_other_prompts(change: str) -> None:
    before = rows(500, 150)
    after = {
        "add": [*before, row("new", "f3")],
        "add a phrasing": [*before, row("new", "another")],
        "remove": before[:250] + before[251:],
        "reword": [replace(r, phrasing="another") if r.id == "p250" else r for r in before],
    }[change]
    was, now = placed(split(before, SplitSpec())), placed(split(after, SplitSpec()))
    moved = [name for name in was if name in now and was[name] != now[name]]
    assert len(moved) <= 10


def test_order_of_rows_does_not_matter() -> None:
    given_rows = rows(200, 50)
    assert placed(split(given_rows, SplitSpec())) == placed(split(given_rows[::-1], SplitSpec()))


def test_equal_prompts_in_two_parts_are_caught() -> None:
    same = [replace(r, prompt="always the same") for r in rows(50, 10)]
    with pytest.raises(AssertionError, match="held-out prompts"):
        split(same, SplitSpec())
