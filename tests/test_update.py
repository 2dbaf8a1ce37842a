from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Ran
from test_export_lora import made_adapter

from edgedistill import update
from edgedistill.artifacts import (
    Checkpoint,
    Identity,
    digest_of_file,
    load_finished,
    manifest_of,
    write_json,
)
from edgedistill.errors import ArtifactError, GateFailed, UsageError
from edgedistill.export import export
from edgedistill.export.lora import export_lora
from edgedistill.memory import PeakMemory
from edgedistill.progress import Silent
from edgedistill.runtime import quantize_file

Run = Callable[..., Ran]
STUDENT = {"weights": "x.gguf", "system": "SQL", "max_tokens": 12}
EXAMPLES = [{"prompt": "the others in the canoe"}, {"prompt": "12 and on"}]


def bundle(folder: Path, seed: int, text: str, adapter: bool = False) -> Path:
    """A bundle by hand: a tiny model in Q8_0, a page about it, and an adapter where asked."""
    scratch = folder.parent / f"scratch-{folder.name}"
    student = tiny.tiny_student(scratch / "student", seed)
    source = Checkpoint(student.folder, f"c{seed}")
    made = export(source, student, "sql", scratch, Silent()).model
    folder.mkdir(parents=True)
    quantize_file(made, folder / "model.gguf", "Q8_0", 1)
    facts = {"model": "model.gguf", "format": "Q8_0"}
    if adapter:
        trained = made_adapter(student, scratch / "adapter")
        lora = export_lora(trained, student, made, "sql", scratch, Silent())
        shutil.copyfile(lora.model, folder / "lora.gguf")
        facts["adapter"] = "lora.gguf"
    (folder / "README.md").write_text(text, "utf-8")
    (folder / "LICENSE").write_text("the same in both", "utf-8")
    write_json(folder / "report.json", {"examples": EXAMPLES})
    identity = Identity("pack", 1, {"recipe": {"student": STUDENT}}, {"seed": str(seed)})
    write_json(
        folder / "manifest.json", manifest_of(identity, folder, facts, time.time(), PeakMemory())
    )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles v1, v2 (another training) and v3 (v1 with an adapter), and updates from v1."""
    root = tmp_path_factory.mktemp("made")
    old = bundle(root / "v1", 0, "one")
    for name, new in (
        ("v2", bundle(root / "v2", 1, "two")),
        ("v3", bundle(root / "v3", 0, "one, and an adapter", adapter=True)),
    ):
        update.make(old, new, root / f"{name}.edup", update.ask, 2)
    return root


@pytest.fixture
def held(made: Path, tmp_path: Path) -> Path:
    """What an app in the field holds: v1."""
    return Path(shutil.copytree(made / "v1", tmp_path / "held"))


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): digest_of_file(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_the_old_bundle_becomes_the_new_one(made: Path, held: Path, name: str) -> None:
    done = update.apply(held, made / f"{name}.edup", compare=update.compare)
    assert files(held) == files(made / name)
    assert (done.changed, done.same, done.samples) == (True, 2, 2)
    assert [path.name for path in held.parent.iterdir()] == ["held"]
    assert not update.apply(held, made / f"{name}.edup").changed


def test_an_adapter_costs_its_own_bytes(made: Path) -> None:
    adapter = (made / "v3" / "lora.gguf").stat().st_size
    size = (made / "v3.edup").stat().st_size
    assert size < adapter + 3000
    with zipfile.ZipFile(made / "v3.edup") as archive:
        contents = update.Contents.model_validate_json(archive.read("update.json"))
        kept = {name for name, entry in contents.files.items() if entry.how == "kept"}
    assert kept == {"model.gguf", "LICENSE", "report.json"}
    assert contents.adapter == "lora.gguf"


def test_the_same_update_twice_has_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = update.make(made / "v1", made / "v2", tmp_path / "again", update.ask, 2)
    assert again.sha256 == digest_of_file(made / "v2.edup")
    assert (again.kept, again.added, again.patched) == (2, 2, 1)


def test_what_the_user_changed_or_added_goes_along(made: Path, held: Path) -> None:
    (held / "README.md").write_text("my notes", "utf-8")
    (held / "mine.txt").write_text("mine", "utf-8")
    update.apply(held, made / "v2.edup")
    assert (held / "README.md").read_text("utf-8") == "two"
    assert (held / "README.md.yours").read_text("utf-8") == "my notes"
    assert (held / "mine.txt").read_text("utf-8") == "mine"
    assert load_finished(held, reused=True) is not None


def rezip(source: Path, into: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of an update with some members changed or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return into


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    """Change `update.json`."""

    def apply(name: str, data: bytes) -> bytes:
        if name != "update.json":
            return data
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return apply


def escape(value: dict[str, Any]) -> None:
    value["files"]["../evil"] = value["files"].pop("README.md")


def promise(value: dict[str, Any]) -> None:
    value["new"] = "0" * 64


def future(value: dict[str, Any]) -> None:
    value["format"] = 2


def shorten(value: dict[str, Any]) -> None:
    value["files"]["model.gguf"]["parts"] = [[5, 0]]


BROKEN: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "altered text": (
        lambda name, data: b"evil" if name == "files/README.md" else data,
        "README.md does not have the sha256",
    ),
    "altered patch": (
        lambda name, data: data[:200] + b"\0" + data[201:] if "patches" in name else data,
        "damaged",
    ),
    "patch gone": (lambda name, data: None if "patches" in name else data, "holds no patches/"),
    "no contents": (lambda name, data: None if name == "update.json" else data, "no update.json"),
    "not JSON": (lambda name, data: b"{" if name == "update.json" else data, "Invalid JSON"),
    "leads out": (edited(escape), "leads out of the bundle"),
    "other promise": (edited(promise), "not the one it promises"),
    "a later format": (edited(future), "format"),
    "parts too short": (edited(shorten), "not as long as the file"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_altered_update_leaves_the_old_bundle(
    made: Path, held: Path, tmp_path: Path, how: str
) -> None:
    change, message = BROKEN[how]
    before, broken = files(held), rezip(made / "v2.edup", tmp_path / "b.edup", change)
    with pytest.raises(ArtifactError, match=message):
        update.apply(held, broken)
    assert files(held) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.edup", "held"]


@pytest.mark.parametrize("size", [0, 1000, -1, -3000])
def test_a_torn_update_leaves_the_old_bundle(
    made: Path, held: Path, tmp_path: Path, size: int
) -> None:
    torn, before = tmp_path / "torn.edup", files(held)
    torn.write_bytes((made / "v2.edup").read_bytes()[:size])
    with pytest.raises(ArtifactError, match="torn or altered"):
        update.apply(held, torn)
    assert files(held) == before


def test_one_altered_bit_is_an_error_or_changes_nothing(made: Path, tmp_path: Path) -> None:
    new, small = bundle(tmp_path / "new", 0, "other words"), tmp_path / "small.edup"
    update.make(made / "v1", new, small, update.ask, 0)
    content, promised = small.read_bytes(), files(new)
    for bit in range(0, 8 * len(content), 11):
        held = Path(shutil.copytree(made / "v1", tmp_path / "held", copy_function=os.link))
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        (tmp_path / "altered.edup").write_bytes(altered)
        try:
            update.apply(held, tmp_path / "altered.edup")
            assert files(held) == promised, bit
        except ArtifactError:
            assert files(held) == files(made / "v1"), bit
        shutil.rmtree(held)


def test_an_update_for_another_bundle_is_refused(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made / "v3", tmp_path / "other"))
    (other / "model.gguf").write_bytes((made / "v2" / "model.gguf").read_bytes())
    with pytest.raises(ArtifactError, match=r"for another bundle: model\.gguf"):
        update.apply(other, made / "v2.edup")


def test_a_promised_sha256_is_held(made: Path, held: Path) -> None:
    with pytest.raises(ArtifactError, match="not the one that was asked for"):
        update.apply(held, made / "v2.edup", sha256="0" * 64)
    assert update.apply(held, made / "v2.edup", digest_of_file(made / "v2.edup")).changed


def test_other_answers_keep_the_old_bundle(made: Path, held: Path, tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["samples"][0]["answer"] += "!"

    other, before = rezip(made / "v2.edup", tmp_path / "o.edup", edited(change)), files(held)
    with pytest.raises(GateFailed, match="1 of 2 sample prompts"):
        update.apply(held, other, compare=update.compare)
    assert files(held) == before


@pytest.mark.parametrize("swapped", [False, True])
def test_cut_off_between_the_renames(made: Path, held: Path, swapped: bool) -> None:
    """The old bundle was moved away, and the new one not yet or already put in its place."""
    if swapped:
        shutil.copytree(held, held.with_name(".held.old"))
    else:
        os.replace(held, held.with_name(".held.old"))
        shutil.copytree(made / "v2", held.with_name(".held.updating"))
    update.apply(held, made / "v2.edup")
    assert files(held) == files(made / "v2")
    assert [path.name for path in held.parent.iterdir()] == ["held"]


@pytest.mark.parametrize("place", ["held", "held/pages"])
def test_who_is_inside_the_bundle_is_sent_out(
    made: Path, held: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (held.parent / place).mkdir(exist_ok=True)
    monkeypatch.chdir(held.parent / place)
    bundle = Path(".") if place == "held" else Path("..")
    before = files(held)
    with pytest.raises(UsageError, match="you are inside it") as caught:
        update.apply(bundle, made / "v2.edup")
    assert "go to the folder above, and give it as held" in str(caught.value)
    assert files(held) == before
    monkeypatch.chdir(held.parent)
    assert update.apply(Path("held"), made / "v2.edup").changed


def test_nothing_to_update(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the same"):
        update.make(made / "v1", made / "v1", tmp_path / "x.edup")
    assert not (tmp_path / "x.edup").exists()


def test_a_changed_bundle_is_not_what_was_shipped(made: Path, held: Path, tmp_path: Path) -> None:
    text = (held / "README.md").read_text("utf-8")
    (held / "README.md").write_text(text.upper(), "utf-8")
    with pytest.raises(ArtifactError, match=r"README\.md was changed"):
        update.make(held, made / "v2", tmp_path / "x.edup")


# The command line


def test_commands(run: Run, made: Path, held: Path, tmp_path: Path) -> None:
    file = tmp_path / "u.edup"
    result = run("--json", "update", "make", str(held), str(made / "v2"), "-o", str(file))
    assert result.code == 0
    assert result.json["bytes"] == file.stat().st_size
    assert result.json["samples"] == 2
    result = run("update", "apply", str(held), str(file), "--check")
    assert result.code == 0
    assert "2 of 2 samples same" in result.out
    assert "already" in run("update", "apply", str(held), str(file)).out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("apply", "nowhere", "v2.edup"), 2, "there is no such folder"),
        (("apply", "v1", "nothing.edup"), 2, "there is no such update file"),
        (("apply", "empty", "v2.edup"), 1, "this is not a bundle"),
        (("apply", "v1", "v2.edup", "--sha256", "00"), 1, "its sha256 is not the one"),
        (("apply", "v1", "v1/README.md"), 1, "torn or altered"),
        (("apply", "v2", "v3.edup"), 1, "this update is for another bundle"),
        (("make", "v1", "v1", "-o", "x"), 2, "the two bundles are the same"),
        (("make", "v1", "empty", "-o", "x"), 1, "this is not a bundle"),
        (("make", "v1", "v2"), 2, "Missing option '-o'"),
    ],
)
def test_bad_input(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch, words: Any, code: int, message: str
) -> None:
    monkeypatch.chdir(made)
    (made / "empty").mkdir(exist_ok=True)
    before = files(made / "v1")
    result = run("update", *words)
    assert result.code == code
    assert message in result.err
    assert files(made / "v1") == before
