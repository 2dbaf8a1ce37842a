"""A hub model is fetched as it is at one commit, and what the hub does not give is said; over HTTP
on loopback, by the hub's own client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_folders import change, model_folder
from hub_server import REPO, REVISION, TOKEN, Hub, files_of, serving
from test_weights import Told

from edgedistill.artifacts import Student
from edgedistill.errors import StorageError, WeightsError
from edgedistill.progress import Progress, Silent
from edgedistill.recipe import StudentSpec
from edgedistill.student import prepare_student
from edgedistill.weights import CACHE_VARIABLE, HubModel
from edgedistill.weights.hub import fetch_model, hub_model

MODEL = HubModel(REPO, REVISION)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("source"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", "utf-8")
    for name in ("training_args.bin", "consolidated.safetensors", "model.onnx"):
        (folder / name).write_bytes(b"nobody needs this")
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serving(files_of(source)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def fetched(progress: Progress | None = None, model: HubModel = MODEL) -> Path:
    return fetch_model(model, progress or Silent())


def prepared(out: Path) -> Student:
    return prepare_student(StudentSpec(weights=str(MODEL)), out, Silent())


@pytest.mark.parametrize("weights", [REPO, f"{REPO}@main", f"{REPO}@", f"{REPO}@{REVISION[:12]}"])
def test_only_a_full_revision_will_do(weights: str) -> None:
    with pytest.raises(WeightsError, match="full revision") as caught:
        hub_model(weights)
    assert f"git ls-remote https://huggingface.co/{REPO} HEAD" in str(caught.value)


@pytest.mark.parametrize("weights", ["smollm2", "./a/b", "../a/b", "a/b/c", "/a/b", "~/a", "a b/c"])
def test_other_names_are_no_hub_models(weights: str) -> None:
    assert hub_model(weights) is None


def test_only_what_is_needed_is_fetched_and_once(hub: Hub, source: Path) -> None:
    told = Told()
    folder = fetched(told)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == {
        *wanted, "README.md", WEIGHTS, "edgedistill.json",
    }  # fmt: skip
    del sizes["edgedistill.json"]
    assert told.bytes * 1e6 == pytest.approx(sum(sizes.values()))
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    hub.asked.clear()
    assert fetched() == folder
    assert hub.asked == []


def test_it_becomes_a_student_also_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = prepared(tmp_path / "out")
    assert (student.name, student.licence) == (REPO, "mit")
    assert student.source == f"hub {REPO}@{REVISION}"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert prepared(tmp_path / "out") == student
    shutil.rmtree(tmp_path / "out")
    assert prepared(tmp_path / "out").digest == student.digest


def test_shards_are_those_of_the_index(hub: Hub, source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    del hub.files[WEIGHTS]
    hub.files |= files_of(tmp_path / "sharded")
    hub.files["model-00009-of-00009.safetensors"] = b"of another index"
    names = {path.name for path in fetched().glob("*.safetensors")}
    assert len(names) > 1
    assert names == {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}


def test_a_file_that_was_cut_off_goes_on_where_it_stopped(hub: Hub, source: Path) -> None:
    whole = (source / WEIGHTS).read_bytes()
    MODEL.folder.mkdir(parents=True)
    (MODEL.folder / f"{WEIGHTS}.part").write_bytes(whole[:1000])
    hub.cuts = {WEIGHTS: 5000}  # and again, which the client mends by itself
    assert (fetched() / WEIGHTS).read_bytes() == whole
    ranges = [r for verb, path, r in hub.asked if verb == "GET" and path.endswith(WEIGHTS)]
    assert ranges[0] == "bytes=1000-"
    assert len(ranges) == 2
    assert not list(MODEL.folder.glob("*.part"))


def test_other_bytes_are_refused_and_removed(hub: Hub) -> None:
    for name in ("tokenizer.json", WEIGHTS):
        hub.lies = {name}
        with pytest.raises(WeightsError, match=f"{name} came with other bytes"):
            fetched()
        assert not list(MODEL.folder.glob(f"{name}*"))


def test_another_family_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = b'{"architectures": ["MambaForCausalLM"]}'
    with pytest.raises(WeightsError, match=r"'MambaForCausalLM'.*Phi-3"):
        prepared(tmp_path / "out")
    assert [name for name in hub.fetched() if name != REVISION] == ["config.json"]


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        (HubModel("no/body", REVISION), "no public repository no/body", "HF_TOKEN"),
        (HubModel(REPO, "f" * 40), "no revision ffff", "git ls-remote"),
    ],
)
def test_what_is_unknown_is_said(hub: Hub, model: HubModel, said: str, hint: str) -> None:
    with pytest.raises(WeightsError, match=said) as caught:
        fetched(model=model)
    assert hint in (caught.value.hint or "")


def test_a_gated_model_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(WeightsError, match="only to those who may have it") as caught:
        fetched()
    assert f"accept its terms at {hub.url}/{REPO}" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetched() / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (WEIGHTS, "has no model.safetensors .* only training_args.bin"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("config.json", "has no config.json"),
    ],
)
def test_files_that_are_missing_are_named(hub: Hub, gone: str, said: str) -> None:
    del hub.files[gone]
    with pytest.raises(WeightsError, match=said):
        fetched()


def test_no_network_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="cannot be reached") as caught:
        fetched()
    assert caught.value.hint == "try again when the network is there"
    (MODEL.folder / "config.json").write_text("{}", "utf-8")
    with pytest.raises(WeightsError, match="what was fetched is kept: try again"):
        fetched()


def test_a_cache_that_cannot_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot keep"):
        fetched()


def test_a_local_change_to_what_was_fetched_is_mended(hub: Hub) -> None:
    folder = fetched()
    change(folder / "config.json", hidden_size=7)
    (folder / "edgedistill.json").unlink()
    assert (fetched() / "config.json").read_bytes() == hub.files["config.json"]
