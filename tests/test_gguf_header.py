from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgedistill.errors import ArtifactError
from edgedistill.gguf_header import TYPES, bytes_as, read_header, type_for

MAGIC_AND_VERSION = b"GGUF" + struct.pack("<I", 3)


def header(tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return MAGIC_AND_VERSION + struct.pack("<QQ", tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(shape: tuple[int, ...], number: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", number, offset)


@pytest.mark.parametrize("name", [t.name for t in gguf.GGMLQuantizationType if t.name in TYPES])
def test_types_are_those_of_the_gguf_package(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    assert TYPES[name] == (int(number), *gguf.GGML_QUANT_SIZES[number])


def test_every_value_is_read(tmp_path: Path) -> None:
    file, weights = tmp_path / "m.gguf", np.arange(64, dtype=np.float32).reshape(2, 32)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint8("small", 7)
    writer.add_float32("half", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("words", ["näïve", ""])
    writer.add_array("numbers", [1, -2])
    writer.add_tensor("a", weights)
    writer.add_tensor("b", gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(file)
    assert found.keys == {
        "general.architecture": "llama",
        "small": 7,
        "half": 0.5,
        "yes": True,
        "words": ["näïve", ""],
        "numbers": [1, -2],
    }
    assert [(t.name, t.type, t.shape, t.columns) for t in found.tensors] == [
        ("a", "F32", (2, 32), 32),
        ("b", "Q8_0", (2, 32), 32),
    ]
    first = found.tensors[0]
    read = np.fromfile(file, np.float32, first.bytes // 4, offset=first.offset)
    assert (read.reshape(first.shape) == weights).all()
    assert [t.bytes for t in found.tensors] == [256, 68]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"not a model", "does not start with GGUF"),
        (b"GGUF" + struct.pack("<I", 9), "version is 9"),
        (MAGIC_AND_VERSION, "middle of its header"),
        (header(keys=2**60), "do not fit"),
        (header(tensors=2**60), "do not fit"),
        (header(keys=1, rest=text(b"k") + struct.pack("<I", 77)), "the type 77"),
        (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 2**50)), "do not fit"),
        (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "an array of the type 9"),
        (header(keys=2, rest=2 * (text(b"k") + struct.pack("<IB", 0, 1))), "'k' is there twice"),
        (
            header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
            "no power of two",
        ),
        (header(tensors=1, rest=tensor((8,), offset=2**40)), "behind the file's end"),
        (header(tensors=1, rest=tensor((2**62, 4))), "behind the file's end"),
        (header(tensors=1, rest=tensor((0,))), "cannot have the shape"),
        (header(tensors=1, rest=tensor((16,), TYPES["Q4_0"][0])), "cannot have the shape"),
        (header(tensors=1, rest=tensor((8,), 99)), "the type 99"),
        (header(tensors=1, rest=tensor((1,) * 5)), "5 dimensions"),
        (header(tensors=2, rest=2 * tensor((1,)) + bytes(99)), "the same name"),
    ],
)
def test_what_is_not_sound_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as failure:
        read_header(file)
    assert failure.value.where == str(file)


@pytest.mark.parametrize(
    ("type", "columns", "made"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("IQ4_XS", 576, "IQ4_NL"),
        ("Q4_0", 48, "F16"),
        ("Q6_K", 48, "F16"),
        ("F16", 7, "F16"),
        ("Q1_0", 576, None),
    ],
)
def test_fallbacks(type: str, columns: int, made: str | None) -> None:
    assert type_for(type, columns) == made


def test_bytes_as() -> None:
    assert bytes_as("Q4_0", (3, 64)) == 3 * 2 * 18
    assert bytes_as("F32", (5,)) == 20
