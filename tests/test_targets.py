"""Targets of many rows in one file, and those that a teacher's traces give."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from edgedistill.alignment import Aligned
from edgedistill.errors import ArtifactError, DatasetError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import CurateSpec, StudentSpec
from edgedistill.student import write_tokenizer
from edgedistill.targets import Coverage, Targets, TargetsWriter, require_coverage
from edgedistill.teacher_targets import teacher_targets

K = 3
ANSWER = "the canoe é"


def random_targets(count: int, seed: int) -> Aligned:
    chance = np.random.default_rng(seed)
    made = Aligned.unknown(count, K)
    made.ids[:] = chance.integers(0, 99, (count, K))
    made.logprobs[:] = np.log(chance.dirichlet([1.0] * (K + 1), count)[:, :K])
    made.known[:] = True
    return made


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = {f"é {n}": random_targets(n, n) for n in (3, 0, 5, 1)}
    with TargetsWriter(tmp_path / "t.safetensors", K) as writer:
        for n, (name, made) in enumerate(rows.items()):
            writer.add(name, made, -float(n))
    found = Targets(tmp_path / "t.safetensors")
    assert (found.rows, found.k, len(found)) == (tuple(rows), K, 4)
    assert "é 3" in found
    assert "x" not in found
    for name, made in rows.items():
        row = found.row(name)
        assert np.array_equal(row.ids, made.ids)
        assert np.array_equal(row.logprobs, made.logprobs)
        assert np.array_equal(row.known, made.known)
        assert (row.ids.dtype, row.logprobs.dtype, row.known.dtype) == (np.int32, np.float32, bool)
        assert row.tail == pytest.approx(1 - np.exp(made.logprobs).sum(1), abs=1e-6)
    assert found.row("é 5").log_likelihood == -2.0
    assert load_file(tmp_path / "t.safetensors")["offsets"].tolist() == [0, 3, 3, 8, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_nothing_is_left_of_what_was_broken_off(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not of 3"), TargetsWriter(tmp_path / "t", K) as writer:
        writer.add("a", Aligned.unknown(2, K + 1))
    assert list(tmp_path.iterdir()) == []


def test_no_rows_at_all(tmp_path: Path) -> None:
    with TargetsWriter(tmp_path / "t", K) as writer:
        pass
    assert len(Targets(tmp_path / "t")) == 0
    assert (writer.coverage.share, writer.coverage.mean_known_mass) == (0.0, 0.0)


@pytest.mark.parametrize("content", [None, b"", b"no targets", (2).to_bytes(8, "little") + b"{}"])
def test_another_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(ArtifactError, match="targets cannot be read"):
        Targets(tmp_path / "t")


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    with TargetsWriter(tmp_path / "t", K) as writer:
        writer.add("a", random_targets(9, 0))
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError):
        Targets(tmp_path / "t")


def test_coverage_below_the_bound_is_refused() -> None:
    coverage = Coverage()
    coverage.add(random_targets(3, 0), None)
    coverage.add(Aligned.unknown(5, K), "no trace")
    require_coverage(coverage, 0.375, bound="b", where="w", hint="h")
    with pytest.raises(
        DatasetError, match=r"w: 3 of 8 .*0\.375.* b .*0\.5.*1 of 2 rows: no trace\n"
    ):
        require_coverage(coverage, 0.5, bound="b", where="w", hint="h")


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> StudentPrompt:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny.tokenizer_keys())
    return StudentPrompt(folder, StudentSpec(weights="w"))


def trace(name: str, text: str, pieces: Sequence[Any] | None) -> dict[str, Any]:
    """Every piece has probability 1/2 and the space as its alternative with 1/4."""
    told = pieces and [[piece, math.log(0.5), [[" ", math.log(0.25)]]] for piece in pieces]
    asked = {"logprobs": True} if pieces else {}
    return {"prompt_id": name, "text": text, "top_logprobs": told, "parameters": asked}


def row(name: str, answer: str = ANSWER) -> EvalRow:
    return EvalRow(name, "a question", answer, "p", True)


def made(
    tmp_path: Path, prompt: StudentPrompt, traces: list[dict[str, Any]], *rows: EvalRow
) -> tuple[Coverage, Targets]:
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(t) + "\n" for t in traces), "utf-8")
    into = tmp_path / "targets.safetensors"
    coverage = teacher_targets(rows, file, prompt, CurateSpec(), K, into, Silent())
    return coverage, Targets(into)


PIECES = ["```\n", "the", " can", "oe ", [0xC3], [0xA9], "\n", "```", ""]


def test_targets_are_those_of_the_students_tokens(tmp_path: Path, prompt: StudentPrompt) -> None:
    text = f"```\n{ANSWER}\n```"
    coverage, found = made(
        tmp_path, prompt, [trace("other", "x", None), trace("a", text, PIECES)], row("a")
    )
    ids = prompt.answer_ids(ANSWER)
    targets = found.row("a")
    assert targets.known.all()
    assert len(targets.ids) == len(ids)
    # Each token that one of the teacher's begins with: 1/2; those within it: certain.
    text_of = [prompt.decode([i]) for i in ids]
    chances = dict(zip(text_of, np.exp(targets.logprobs[:, 0]), strict=True))
    assert text_of[:2] == ["the", " c"]
    assert chances["the"] == pytest.approx(0.5)
    assert chances["an"] == pytest.approx(1.0)
    assert (targets.ids[:, 0] == ids).all()
    space = prompt.encode(" ")[0]
    assert targets.ids[:2].tolist() == [[ids[0], -1, -1], [ids[1], space, -1]]
    assert (coverage.share, coverage.rows, coverage.unknown.total()) == (1.0, 1, 0)
    assert coverage.mean_known_mass == pytest.approx(0.75)  # of the end, what led there: 1/4
    assert targets.log_likelihood == pytest.approx(math.log(0.5))


def test_rows_without_targets_say_why(tmp_path: Path, prompt: StudentPrompt) -> None:
    traces = [
        trace("good", ANSWER, ["the canoe ", [0xC3, 0xA9]]),
        trace("none", ANSWER, None),
        trace("changed", "another text", ["another text"]),
        trace("odd", ANSWER, ["something else"]),
    ]
    rows = [row(name) for name in ("absent", "none", "changed", "odd", "good")]
    coverage, found = made(tmp_path, prompt, traces, *rows)
    assert found.rows == ("good", "none", "changed", "odd", "absent")
    assert [bool(found.row(r.id).known.any()) for r in rows] == [False] * 4 + [True]
    tokens = len(prompt.answer_ids(ANSWER))
    assert found.row("absent").ids.shape == (tokens, K)
    assert math.isnan(found.row("odd").log_likelihood)
    assert coverage.share == pytest.approx((tokens - 1) / (5 * tokens))  # its end was not told
    assert coverage.facts()["rows_without_targets"] == {
        "its answer is not the cleaned answer of its trace": 1,
        "its trace has no log-probabilities (teacher.sampling.top_logprobs)": 1,
        "the tokens of its trace are not those of its answer": 1,
        "there is no trace of the prompt": 1,
    }


@pytest.mark.parametrize("broken", ["{", '{"prompt_id": "a"}', "[]"])
def test_traces_that_cannot_be_read(tmp_path: Path, prompt: StudentPrompt, broken: str) -> None:
    (tmp_path / "traces.jsonl").write_text(broken, "utf-8")
    with pytest.raises(ArtifactError, match="traces cannot be read"):
        teacher_targets(
            [row("a")], tmp_path / "traces.jsonl", prompt, CurateSpec(), K, tmp_path / "t", Silent()
        )
    with pytest.raises(ArtifactError, match="traces cannot be read"):
        made(tmp_path, prompt, [{**trace("a", ANSWER, ["a"]), "top_logprobs": [3]}], row("a"))
