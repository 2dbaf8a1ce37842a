"""Types of single tensors and importance matrices, through the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from edgedistill.errors import ArtifactError, EdgedistillError, RuntimeFailure
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.gguf_header import FLOATS, QUANTIZED, read_header, type_for
from edgedistill.importance import Importance, write_importance
from edgedistill.progress import Silent
from edgedistill.quantize_request import NEED_IMPORTANCE, PLAIN, named_by
from edgedistill.runtime import LlamaCpp, quantize_file
from edgedistill.student import TOKENIZER_GGUF

EMBEDDING, UP, NORM = "token_embd.weight", "blk.1.ffn_up.weight", "blk.0.attn_norm.weight"
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # llama.cpp builds a table first


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.tiny_student(folder)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(folder, folder / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def importance(model: Path) -> Path:
    """Every matrix, embedding included, with columns of very different weight."""
    chance = np.random.default_rng(0)
    matrices = [t for t in read_header(model).tensors if len(t.shape) > 1]
    sums = {t.name: chance.exponential(100, t.columns).astype(np.float32) for t in matrices}
    file = model.with_name("importance.gguf")
    write_importance(file, Importance(sums, dict.fromkeys(sums, 50.0), ("made up",), 5, 10))
    return file


def data(file: Path, name: str) -> bytes:
    tensor = next(t for t in read_header(file).tensors if t.name == name)
    return file.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]


def test_every_matrix_becomes_the_type_asked_for(
    model: Path, importance: Path, tmp_path: Path
) -> None:
    """Each type on some matrix; the tied embedding too, which a mixture would give more bits."""
    source = read_header(model)
    matrices = sorted((t for t in source.tensors if len(t.shape) > 1), key=lambda t: t.bytes)
    kinds = [kind for kind in (*FLOATS, *QUANTIZED) if kind not in SLOW]
    names = [t.name for t in matrices]
    for part in (kinds[: len(names)], kinds[len(names) :]):
        types = dict(zip(names, part, strict=False))
        file = tmp_path / "q.gguf"
        made = quantize_file(model, file, "Q4_K_M", 1, importance=importance, types=types)
        assert {name: made.types[name] for name in types} == types
        assert made.types[NORM] == "F32"
        assert made.bytes == file.stat().st_size
    with LlamaCpp(file, threads=1) as runtime:
        assert runtime.facts["n_vocab"] > 0


@pytest.mark.parametrize("kind", [*sorted(PLAIN), "TQ1_0"])
def test_a_file_is_called_by_its_commonest_type(model: Path, tmp_path: Path, kind: str) -> None:
    source, file = read_header(model), tmp_path / "q.gguf"
    types = {t.name: kind for t in source.tensors if len(t.shape) > 1} | {UP: "F16"}
    made = quantize_file(model, file, named_by(types), 1, types=types)
    assert {name: made.types[name] for name in types} == types
    called = kind if kind in PLAIN else "Q8_0"
    with LlamaCpp(file, threads=1) as runtime:
        assert called in runtime.facts["description"]


def test_a_type_is_for_one_tensor_alone(model: Path, tmp_path: Path) -> None:
    """Names are regular expressions to llama.cpp: no dot stands for another character."""
    made = quantize_file(model, tmp_path / "q.gguf", "Q4_0", 1, types={UP: "Q8_0"}, pure=True)
    assert made.types.pop(UP) == "Q8_0"
    assert set(made.types.values()) == {"F32", "Q4_0"}


def test_pure_leaves_the_mixture_out(model: Path, tmp_path: Path) -> None:
    assert quantize_file(model, tmp_path / "m.gguf", "Q4_0", 1).types[EMBEDDING] == "Q6_K"
    made = quantize_file(model, tmp_path / "p.gguf", "Q4_0", 1, pure=True)
    assert made.types[EMBEDDING] == "Q4_0"


def test_an_importance_matrix_changes_the_values(
    model: Path, importance: Path, tmp_path: Path
) -> None:
    plain, weighed = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    quantize_file(model, plain, "Q4_0", 1, pure=True)
    quantize_file(model, weighed, "Q4_0", 1, pure=True, importance=importance)
    assert data(plain, UP) != data(weighed, UP)
    assert data(plain, EMBEDDING) != data(weighed, EMBEDDING)
    assert read_header(weighed).keys["quantize.imatrix.file"] == "importance.gguf"
    assert read_header(weighed).keys["quantize.imatrix.chunks_count"] == 5


def test_an_f32_source(model: Path, tmp_path: Path) -> None:
    whole, from_half, from_whole = (tmp_path / name for name in ("f32", "a", "b"))
    made = quantize_file(model, whole, "F32", 1)
    assert set(made.types.values()) == {"F32"}
    quantize_file(model, from_half, "Q4_0", 1)
    quantize_file(whole, from_whole, "Q4_0", 1)
    assert data(from_half, UP) == data(from_whole, UP)


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XXS", "Q8_0"])
def test_fallbacks_are_known_before(tmp_path: Path, type: str) -> None:
    """A row of 96 values: no whole block of 256."""
    tiny.tiny_student(tmp_path)
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    file, narrow = tmp_path / "model.gguf", tmp_path / "narrow.gguf"
    write_gguf(tmp_path, tmp_path / TOKENIZER_GGUF, file, made_from, Silent())
    tiny.rewrite_gguf(file, narrow, tensors={UP: lambda values: values[:, :96]})
    made = quantize_file(narrow, tmp_path / "q.gguf", "Q8_0", 1, types={UP: type})
    assert made.types[UP] == type_for(type, 96)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"types": {UP: "Q9_9"}}, "has no type 'Q9_9' for blk.1.ffn_up.weight; it has F32, "),
        ({"types": {UP: "I32"}}, "has no type 'I32'"),
        ({"types": {"blk.9.ffn_up.weight": "Q4_0"}}, "no tensor 'blk.9.ffn_up.weight'"),
        ({"types": {NORM: "Q4_0"}}, "should become Q4_0, llama.cpp made F32"),
        ({"types": {UP: "Q4_0"}, "format": "F16"}, "cannot be given with format F16"),
        ({"types": {EMBEDDING: "IQ2_XXS"}}, "IQ2_XXS without an importance matrix"),
        ({"importance": "model.gguf"}, "no importance matrix"),
        ({"importance": "missing.gguf"}, "No such file"),
    ],
)
def test_what_cannot_be_asked(
    model: Path, tmp_path: Path, given: dict[str, object], message: str
) -> None:
    asked = {"format": "Q4_0", **given}
    if isinstance(given.get("importance"), str):
        asked["importance"] = model.with_name(str(given["importance"]))
    with pytest.raises(EdgedistillError, match=message):
        quantize_file(model, tmp_path / "q.gguf", threads=1, **asked)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type", sorted(NEED_IMPORTANCE))
def test_llama_cpp_needs_a_matrix_for_the_types_we_say(
    model: Path, tmp_path: Path, type: str
) -> None:
    with pytest.raises(RuntimeFailure, match="requires an importance matrix"):
        quantize_file(model, tmp_path / "q.gguf", type, 1, pure=True)


def test_a_quantized_source_is_refused(model: Path, tmp_path: Path) -> None:
    quantize_file(model, tmp_path / "q.gguf", "Q8_0", 1)
    with pytest.raises(
        ArtifactError, match=r"already: tensor token_embd.weight is Q8_0"
    ) as failure:
        quantize_file(tmp_path / "q.gguf", tmp_path / "again.gguf", "Q4_0", 1)
    assert failure.value.where == str(tmp_path / "q.gguf")


def test_a_matrix_of_another_model_is_refused(
    model: Path, importance: Path, tmp_path: Path
) -> None:
    other = tiny.rewrite_gguf(
        model, tmp_path / "m.gguf", tensors={UP: lambda values: values[:, :96]}
    )
    with pytest.raises(ArtifactError, match=r"blk.1.ffn_up.weight has 256 columns here and 96"):
        quantize_file(other, tmp_path / "q.gguf", "Q4_0", 1, importance=importance)
