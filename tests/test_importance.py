from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgedistill.errors import ArtifactError
from edgedistill.gguf_header import Header, TensorInfo
from edgedistill.importance import Importance, read_importance, require_fit, write_importance

DOWN, HEAD = "blk.0.ffn_down.weight", "token_embd.weight"
IMPORTANCE = Importance(
    sums={DOWN: np.array([4, 0, 2, 6], np.float32), HEAD: np.array([1, 3], np.float32)},
    counts={DOWN: 4.0, HEAD: 0.0},
    datasets=("support-sql",),
    chunk_count=3,
    chunk_size=5,
)
MODEL = Header(
    {},
    (
        TensorInfo(HEAD, "F16", (9, 2), 0),
        TensorInfo("blk.0.attn_norm.weight", "F32", (2,), 0),
        TensorInfo(DOWN, "F16", (2, 4), 0),
    ),
)


def written(file: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    """A GGUF file as llama.cpp's imatrix tool lays it out."""
    writer = gguf.GGUFWriter(file, "none")
    told = {"general.type": "imatrix", "datasets": ["a.txt"], "chunk_count": 2, "chunk_size": 8}
    for name, value in {**told, **keys}.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(f"imatrix.{name}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{name}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, None if name == "f64.counts" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "importance.gguf"
    write_importance(file, IMPORTANCE)
    found = read_importance(file)
    assert replace(found, sums={}) == replace(IMPORTANCE, sums={})
    assert {name: sums.tolist() for name, sums in found.sums.items()} == {
        name: sums.tolist() for name, sums in IMPORTANCE.sums.items()
    }


def test_a_file_without_datasets_can_be_written(tmp_path: Path) -> None:
    write_importance(tmp_path / "i.gguf", replace(IMPORTANCE, datasets=()))
    assert read_importance(tmp_path / "i.gguf").datasets == ()


def test_mean_is_over_the_tokens() -> None:
    assert IMPORTANCE.mean(DOWN).tolist() == [1, 0, 0.5, 1.5]
    assert IMPORTANCE.mean(HEAD).tolist() == [1, 1]  # nothing was counted


def test_reads_what_llama_cpp_writes(tmp_path: Path) -> None:
    tensors = {f"{DOWN}.in_sum2": [[8.0, 16.0]], f"{DOWN}.counts": [[4.0]]}
    found = read_importance(written(tmp_path / "i.gguf", tensors))
    assert found.mean(DOWN).tolist() == [2, 4]
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("a.txt",), 2, 8)


SOUND = {"t.in_sum2": [[1.0, 2.0]], "t.counts": [[4.0]]}


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (SOUND, {"general.type": "model"}, "no importance matrix"),
        (SOUND, {"chunk_count": None}, "lacks imatrix.datasets"),
        ({"t.counts": [[1.0]]}, {}, "does not hold sums and counts"),
        ({"t.in_sum2": [[1.0]]}, {}, "does not hold sums and counts"),
        ({**SOUND, "other": [1.0]}, {}, "does not hold sums and counts"),
        ({**SOUND, "t.counts": [[4.0], [5.0]]}, {}, "mixture of experts"),
        ({**SOUND, "t.in_sum2": [[1.0, np.nan]]}, {}, "no sum of squares"),
        ({**SOUND, "t.in_sum2": [[1.0, -1.0]]}, {}, "no sum of squares"),
        ({"f64.in_sum2": [[1.0]], "f64.counts": [[1.0]]}, {}, "is F64, not F32"),
    ],
)
def test_wrong_files(
    tmp_path: Path, tensors: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    file = written(tmp_path / "i.gguf", tensors, **keys)
    with pytest.raises(ArtifactError, match=message) as failure:
        read_importance(file)
    assert failure.value.where == str(file)


def test_a_text_is_no_importance_matrix(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_text("prompts")
    with pytest.raises(ArtifactError, match="does not start with GGUF"):
        read_importance(tmp_path / "i.dat")


def test_a_matrix_of_this_model_fits() -> None:
    require_fit(IMPORTANCE, Path("i.gguf"), MODEL)
    without_head = replace(IMPORTANCE, sums={DOWN: IMPORTANCE.sums[DOWN]})
    require_fit(without_head, Path("i.gguf"), MODEL)  # llama.cpp's own leaves it out


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({HEAD: np.ones(2, np.float32)}, "it lacks blk.0.ffn_down.weight"),
        ({**IMPORTANCE.sums, "blk.7.ffn_up.weight": np.ones(2)}, "has blk.7.ffn_up.weight besides"),
        (
            {DOWN: np.ones(3, np.float32)},
            "blk.0.ffn_down.weight has 3 columns here and 4 in the model",
        ),
    ],
)
def test_a_matrix_of_another_model(sums: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as failure:
        require_fit(replace(IMPORTANCE, sums=sums), Path("i.gguf"), MODEL)
    assert failure.value.where == "i.gguf"


@pytest.mark.parametrize("number", range(100))
def test_a_damaged_matrix_is_an_error_or_taken(tmp_path: Path, number: int) -> None:
    file, chance = tmp_path / "i.gguf", random.Random(number)
    write_importance(file, IMPORTANCE)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] = chance.choice([0, 255, chance.randrange(256)])
    file.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    with contextlib.suppress(ArtifactError):  # any other error is a fault of the reader
        read_importance(file)
