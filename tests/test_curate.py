"""Curation: every reason to reject, and what the split promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgedistill.artifacts import Dataset, TokenMixEntry, Traces, digest_of
from edgedistill.check_specs import TextCheck
from edgedistill.curate import REASONS, curate
from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.fidelity import read_rows
from edgedistill.progress import Silent
from edgedistill.recipe import CurateSpec
from edgedistill.tokenmix import TokenMix

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


def test_what_counts_nothing_is_measured_but_not_learnt(tmp_path: Path) -> None:
    entries = [replace(e, reference=str(at % 2)) for at, e in enumerate(many(60, 20))]
    traces = [trace(e.id, "1") for e in entries]
    plain = run(tmp_path / "plain", entries, traces)
    made = run(tmp_path / "strict", entries, traces, CurateSpec(contradicted_score=0))
    for part in ("validation", "held_out"):
        both = ([(row["id"], row["answer"]) for row in lines(one, part)] for one in (plain, made))
        assert next(both) == next(both)
    kept = {row["id"] for row in lines(plain, "train") if row["reference"] == "1"}
    assert {row["id"] for row in lines(made, "train")} == kept
    rejected = lines(made, "rejected")
    assert {row["reason"] for row in rejected} == {"contradicted"}
    assert len(rejected) == made.rejected == plain.train - len(kept) > 0


@pytest.mark.parametrize("score", [0.25, 0.5])
def test_an_answer_that_is_not_the_reference_counts_less(tmp_path: Path, score: float) -> None:
    entries = [replace(e, reference=str(at % 2)) for at, e in enumerate(many(30, 10))]
    spec = CurateSpec(contradicted_score=score)
    made = run(tmp_path, entries, [trace(e.id, "1") for e in entries], spec)
    assert made.rejected == 0
    rows = [row for part in PARTS for row in lines(made, part)]
    assert {row["score"] for row in rows if row["reference"] == "1"} == {1.0}
    assert {row["score"] for row in rows if row["reference"] == "0"} == {score}
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
