"""What our JSON files have around their contents."""

from __future__ import annotations

import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import ArtifactError
from edgedistill.kept_file import Kept, held_by

THING = Kept("edgedistill-thing", 2, "thing", ("made",), "things are made by hand")


def kept(folder: Path, **value: Any) -> Path:
    file = folder / "thing.json"
    file.write_text(json.dumps({"kind": THING.kind, "version": 2, "made": "now", **value}), "utf-8")
    return file


def test_its_fields(tmp_path: Path) -> None:
    assert THING.read(kept(tmp_path, more=1))["more"] == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"kind": "edgedistill-other"},
            "it is no thing: its kind is not edgedistill-thing\n  things are made by hand",
        ),
        (
            {"version": 3},
            "version 3, and this reads 2\n  it was made by a newer edgedistill: update this one",
        ),
        (
            {"version": 1},
            "and this reads 2\n  it was made by an older edgedistill, so make it again: things are",
        ),
        ({"version": "x"}, "it is of version x, and this reads 2\n  things are made by hand"),
    ],
)
def test_what_is_refused(tmp_path: Path, value: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        THING.read(kept(tmp_path, **value))


def test_a_missing_field(tmp_path: Path) -> None:
    (tmp_path / "thing.json").write_text('{"kind": "edgedistill-thing", "version": 2}', "utf-8")
    with pytest.raises(ArtifactError, match="it lacks made"):
        THING.read(tmp_path / "thing.json")


def test_a_file_that_is_cut_in_half(tmp_path: Path) -> None:
    file = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=r"cut off or damaged.*\n  make it again: things are"):
        THING.read(file)
    assert held_by(file) is None  # which kind it was is not known


def test_a_model_is_told_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with file.open("wb") as stream:
        stream.write(b"GGUF")
        stream.truncate(64 << 20)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="it is a model, and no thing of one"):
        THING.read(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="pipes without a name")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    text = kept(tmp_path).read_text("utf-8")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    assert THING.read(pipe)["made"] == "now"
    writer.join(5)


@pytest.mark.parametrize(
    ("text", "kind", "foreign"),
    [
        ('{"kind": "edgedistill-other"}', "edgedistill-other", False),
        ('{"kind": "of somebody else"}', "of somebody else", True),
        ("{}", "", True),
        ("[1]", "", True),
        pytest.param("[" * 99999, "", True, id="deep"),
    ],
)
def test_kinds(tmp_path: Path, text: str, kind: str, foreign: bool) -> None:
    (tmp_path / "a.json").write_text(text, "utf-8")
    held = held_by(tmp_path / "a.json")
    assert held is not None
    assert (held.kind, held.is_foreign) == (kind, foreign)
