"""Export by optimum. What needs its environment (1.2 GB) runs where that is there already, or where
EDGEDISTILL_MAKE_ENVIRONMENTS is set; transformers.js where EDGEDISTILL_NODE_MODULES names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgedistill.artifacts import Checkpoint, Dataset, Exported
from edgedistill.errors import ArtifactError, GateFailed, RuntimeFailure
from edgedistill.export.optimum import (
    CHILD,
    FORMATS,
    PINS,
    export_optimum,
    read_config,
)
from edgedistill.export.optimum_check import check_optimum
from edgedistill.own_environment import OwnEnvironment, prepare, read_pins, run_script
from edgedistill.own_environment import find as find_environment
from edgedistill.progress import Silent
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import StudentSpec

SPEC = StudentSpec(weights="tiny", system="Answer with one query.")
BOUND = 1e-4
TURNS = [
    {"role": "user", "content": "  Count to 10:\n\t1, 2, 3 — näïve 中文 🙂 it's <b>2024</b>"},
    {"role": "assistant", "content": "1 2 3"},
    {"role": "user", "content": "the other one"},
]
MODULES = os.environ.get("EDGEDISTILL_NODE_MODULES", "")


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5, "rope_scaling": None}),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": None},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
            | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ],
)
def test_rope_by_both_names(tmp_path: Path, rope: dict[str, Any], wanted: dict[str, Any]) -> None:
    given = {"model_type": "llama", "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(given), "utf-8")
    assert read_config(tmp_path) == given | wanted


def test_rope_without_a_name_there(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_theta": 1e6}, "other_attention": {"rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}), "utf-8")
    with pytest.raises(ArtifactError, match="no names in transformers 4"):
        read_config(tmp_path)


# With the environment


@pytest.fixture(scope="module")
def environment() -> OwnEnvironment:
    pins = read_pins(PINS)
    if find_environment(pins) is None and not os.environ.get("EDGEDISTILL_MAKE_ENVIRONMENTS"):
        pytest.skip("optimum's environment is not here; EDGEDISTILL_MAKE_ENVIRONMENTS makes it")
    return prepare(pins, Silent())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_student(folder)
    # Not the default: who reads only the old name computes something else.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Checkpoint(folder, "checkpoint")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.tiny_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def exported(
    environment: OwnEnvironment, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    return export_optimum(checkpoint, SPEC, tmp_path_factory.mktemp("out"), Silent())


@pytest.mark.integration
def test_every_file_is_measured(
    exported: Exported, checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path
) -> None:
    facts = check_optimum(checkpoint, exported, dataset, SPEC, BOUND, tmp_path, Silent())
    klds = [facts["kld"][format.dtype]["mean_kld"] for format in FORMATS]
    assert klds[0] < 1e-9 < klds[1] < klds[2]
    assert facts["texts_compared"] == 4 + 4 + 4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        own, source = exported.folder / name, checkpoint.folder / name
        assert own.read_bytes() == source.read_bytes()
    generation = json.loads((exported.folder / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == tiny.STOP


@pytest.mark.integration
def test_a_tied_head_is_stored_once(exported: Exported) -> None:
    bytes_each = {f.dtype: (exported.model.parent / f.file).stat().st_size for f in FORMATS}
    weights = json.loads((exported.folder / "manifest.json").read_text("utf-8"))["facts"]["files"]
    assert weights["fp32"]["tied"] is True
    assert bytes_each["fp32"] > bytes_each["q8"] > bytes_each["q4"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tokenizer.json", {"version": "1.1"}, r"tokenizer\.json is not the one"),
        ("generation_config.json", {"eos_token_id": 0}, r"it ends answers at \[0\]"),
    ],
)
def test_what_is_broken_is_named(
    exported: Exported,
    checkpoint: Checkpoint,
    dataset: Dataset,
    tmp_path: Path,
    name: str,
    change: dict[str, Any],
    said: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported.folder, broken)
    value = json.loads((broken / name).read_text("utf-8")) | change
    (broken / name).write_text(json.dumps(value), "utf-8")
    made = Exported(broken, "broken", broken / "onnx" / "model.onnx")
    out = tmp_path / "out"
    with pytest.raises(GateFailed, match=said):
        check_optimum(checkpoint, made, dataset, SPEC, BOUND, out, Silent())


@pytest.mark.integration
def test_an_architecture_that_optimum_lacks(
    environment: OwnEnvironment, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint.folder, other)
    config = json.loads((other / "config.json").read_text("utf-8")) | {"model_type": "mamba3"}
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(RuntimeFailure, match="optimum cannot export the architecture 'mamba3'"):
        export_optimum(Checkpoint(other, "other"), SPEC, tmp_path / "out", Silent())


@pytest.mark.integration
@pytest.mark.skipif(not (MODULES and shutil.which("node")), reason="no node, or no transformers.js")
@pytest.mark.parametrize("dtype", [format.dtype for format in FORMATS])
def test_transformers_js(
    environment: OwnEnvironment, exported: Exported, checkpoint: Checkpoint, dtype: str
) -> None:
    """The same IDs, the same rendered conversations, and ONNX Runtime's answers in node."""
    student = StudentPrompt(checkpoint.folder, SPEC)
    talks = [student.messages(f"the answer to {i} and {'on ' * i}") for i in range(12)]
    talks += [TURNS[:count] for count in (1, 2, 3)]
    texts = [turn["content"] for turn in TURNS]
    asked = {"modules": MODULES, "folder": str(exported.folder), "dtype": dtype}
    asked |= {"texts": texts, "talks": talks, "max_tokens": 8}
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("optimum_node.mjs"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == [student.encode(text) for text in texts]
    ask = [talk for talk in talks if talk[-1]["role"] == "user"]
    rendered = [student.render_messages(talk, talk[-1]["role"] == "user") for talk in talks]
    assert found["rendered"] == rendered
    prompts = [student.encode(student.render_messages(talk, True)) for talk in ask]
    assert found["prompts"] == prompts
    file = next(format.file for format in FORMATS if format.dtype == dtype)
    request = {"do": "answers", "folder": str(exported.folder), "file": file}
    wanted = run_script(environment, CHILD, {**request, "prompts": prompts, "max_tokens": 8}, 600)
    assert found["answers"] == wanted
