"""Parts of a dataset, and the result in words. Curves are made in integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_tuning import sample_curve
from tiny import tiny_dataset

from edgedistill.artifacts import Dataset
from edgedistill.errors import UsageError
from edgedistill.fidelity import read_rows
from edgedistill.learning_curve import learning_curve, said, subset
from edgedistill.progress import Silent
from edgedistill.recipe import Recipe


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = tiny_dataset(tmp_path / "dataset", rows=12)
    file = made.folder / "train.jsonl"
    lines = file.read_text("utf-8").splitlines()
    # A prompt may hold what Python, but no JSONL reader, takes for the end of a line.
    told = json.loads(lines[3]) | {"prompt": "one\u2028two"}
    lines[3] = json.dumps(told, ensure_ascii=False)
    file.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return made


def ids(dataset: Dataset) -> list[str]:
    return [row.id for row in read_rows(dataset.folder / "train.jsonl")]


def test_smaller_parts_lie_inside_larger_ones(dataset: Dataset, tmp_path: Path) -> None:
    parts = [subset(dataset, rows, 0, tmp_path, Silent()) for rows in (2, 5, 11)]
    kept = [ids(part) for part in parts]
    assert [len(rows) for rows in kept] == [part.train for part in parts] == [2, 5, 11]
    assert set(kept[0]) < set(kept[1]) < set(kept[2]) < set(ids(dataset))
    assert kept[2] == [row for row in ids(dataset) if row in kept[2]]  # in their order
    assert len({part.digest for part in parts}) == 3
    before = (dataset.folder / "train.jsonl").read_bytes().split(b"\n")
    assert set((parts[2].folder / "train.jsonl").read_bytes().split(b"\n")) <= set(before)
    for name in ("validation", "held_out", "rejected"):
        file = f"{name}.jsonl"
        assert (parts[0].folder / file).read_bytes() == (dataset.folder / file).read_bytes()


def test_all_rows_are_the_dataset_and_another_seed_draws_others(
    dataset: Dataset, tmp_path: Path
) -> None:
    assert subset(dataset, 12, 3, tmp_path, Silent()) is dataset
    one, other = (subset(dataset, 4, seed, tmp_path, Silent()) for seed in (0, 1))
    assert ids(one) != ids(other)
    assert ids(subset(dataset, 4, 0, tmp_path / "again", Silent())) == ids(one)


@pytest.mark.parametrize(
    ("sizes", "seeds", "why"),
    [
        ((), 1, "there are 0"),
        ((0.5, 0.0), 1, "0 is none"),
        ((0.5, 1.5), 1, "1.5 is none"),
        ((float("nan"),), 1, "nan is none"),
        (tuple(i / 20 for i in range(1, 21)), 1, "there are 20"),
        ((1.0,), 0, "--seeds is 0"),
    ],
)
def test_what_is_no_size_is_refused(
    tmp_path: Path, sizes: tuple[float, ...], seeds: int, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        learning_curve(Recipe.model_construct(), sizes, seeds, tmp_path / "ws", Silent())
    assert not (tmp_path / "ws").exists()


def test_the_forecast_in_words() -> None:
    told = said(sample_curve().forecast, 418, 512, 301_000)
    assert told == (
        "Twice the training rows (418 to 836) would bring agreement to about 91.0 % (95 % "
        "interval 87.0 to 95.0), +5.2 points (+2.0 to +7.0), by the curve error = a + b n^-c: "
        "about 512 more calls of the teacher, 301,000 tokens."
    )
    refused = said(sample_curve("there is no trend").forecast, 418, 512, 301_000)
    assert refused.startswith("No forecast: there is no trend. As many training rows again")
    assert refused.endswith("about 512 more calls of the teacher, 301,000 tokens.")
