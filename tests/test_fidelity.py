from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgedistill.fidelity import (
    BLOCK_BYTES,
    NOT_FINITE,
    Logits,
    compare,
    follows,
    kl_divergence,
    per_token,
    read_rows,
    record,
)

VOCAB = 50


def logits(rows: int, seed: int, vocab: int = VOCAB) -> Logits:
    return np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 5


def by_hand(before: Logits, after: Logits) -> list[float]:
    """The definition, one row at a time."""
    found = []
    for a, b in zip(before.astype(np.float64), after.astype(np.float64), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        found.append(float((p * np.log(p / q)).sum()))
    return found


@pytest.mark.parametrize("vocab", [VOCAB, BLOCK_BYTES // 8 // 3])  # one block, several
def test_compare_is_the_definition(tmp_path: Path, vocab: int) -> None:
    before, after = logits(10, 0, vocab), logits(10, 1, vocab)
    after[4] = before[4]
    record([before[:4], before[4:]], tmp_path / "a")
    assert record([after], tmp_path / "b") == 10
    found = compare(tmp_path / "a", tmp_path / "b", vocab)
    expected = by_hand(before, after)
    assert found.mean_kld == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.p99_kld == pytest.approx(np.quantile(expected, 0.99), rel=1e-9)
    assert found.max_kld == pytest.approx(max(expected), rel=1e-9)
    assert found.top1 == np.mean(before.argmax(1) == after.argmax(1))
    assert found.tokens == 10


def test_same_logits_give_zero(tmp_path: Path) -> None:
    record([logits(3, 0)], tmp_path / "a")
    found = compare(tmp_path / "a", tmp_path / "a", VOCAB)
    assert (found.mean_kld, found.max_kld, found.top1) == (0, 0, 1)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    assert kl_divergence(logits(3, 0), logits(3, 0) + np.float32(64)).max() < 1e-9


def test_direction_is_before_to_after() -> None:
    before, after = logits(1, 0), logits(1, 1)
    assert kl_divergence(before, after)[0] != pytest.approx(kl_divergence(after, before)[0])


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_breaks_any_bound(odd: float) -> None:
    before, after = logits(2, 0), logits(2, 1)
    after[1, 7] = odd
    found = kl_divergence(before, after)
    assert found[1] == NOT_FINITE
    assert found[0] < 100


def test_per_token_from_the_middle(tmp_path: Path) -> None:
    before, after = logits(9, 0), logits(3, 1)
    record([before], tmp_path / "a")
    record([after], tmp_path / "b")
    kld, same = per_token(tmp_path / "a", tmp_path / "b", VOCAB, skip=5)
    assert kld == pytest.approx(by_hand(before[5:8], after))
    assert same.tolist() == (before[5:8].argmax(1) == after.argmax(1)).tolist()


@pytest.mark.parametrize(("rows", "vocab"), [(4, VOCAB), (3, VOCAB + 1), (0, VOCAB)])
def test_files_that_do_not_match_are_refused(tmp_path: Path, rows: int, vocab: int) -> None:
    record([logits(3, 0)], tmp_path / "a")
    record([logits(rows, 0)], tmp_path / "b")
    with pytest.raises(ValueError, match="holds"):
        compare(tmp_path / "a", tmp_path / "b", vocab)


@pytest.mark.parametrize(
    ("likely", "max_tokens", "same"),
    [([5, 6, 2], 9, True), ([5, 7, 2], 9, False), ([5, 6, 2], 2, True), ([5, 6, 2], 1, False)],
)
def test_an_answer_is_followed_to_its_end_or_not(
    likely: list[int], max_tokens: int, same: bool
) -> None:
    assert follows(likely, [5, 6, 2], max_tokens) is same


def test_read_rows(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "p\u2028q", "answer": "x", "phrasing": "p", "seen": False}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", "utf-8")
    assert [(r.prompt, r.answer, r.seen, r.weight) for r in read_rows(file)] == [
        ("p\u2028q", "x", False, 1.0)
    ]
