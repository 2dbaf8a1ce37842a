from __future__ import annotations

import pytest

from edgedistill.gguf_header import bytes_as, type_for
from edgedistill.number_formats import FORMATS, onnx_format, stored_bytes, usable


@pytest.mark.parametrize(
    ("name", "columns", "stored"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q6_K", 576, "Q8_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q4_K", 576, "Q5_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q2_K", 576, "Q4_0"),
        ("IQ4_NL", 576, "IQ4_NL"),
        ("IQ4_NL", 40, "F16"),
        ("Q4_K", 40, "F16"),
        ("BF16", 7, "BF16"),
    ],
)
def test_what_llama_cpp_puts_in_its_place(name: str, columns: int, stored: str) -> None:
    assert usable(name, columns) == stored


@pytest.mark.parametrize(
    ("name", "columns", "size"),
    [("Q4_0", 576, 18 * 18), ("Q4_K", 576, 18 * 22), ("Q4_K", 512, 2 * 144), ("F16", 7, 14)],
)
def test_stored_bytes(name: str, columns: int, size: int) -> None:
    assert stored_bytes(3, columns, name) == 3 * size


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [32, 40, 256, 576, 4096])
def test_what_is_planned_is_what_a_file_is_checked_by(name: str, columns: int) -> None:
    written = type_for(name, columns)
    assert written == usable(name, columns)
    assert stored_bytes(3, columns, name) == bytes_as(written, (3, columns))


def test_onnx() -> None:
    assert onnx_format("int8-b128-asym").block == 128
    assert stored_bytes(2, 64, "int4-b32") == 2 * (32 + 8)
    assert stored_bytes(2, 96, "int4-b32-asym") == 2 * (48 + 12 + 2)


@pytest.mark.parametrize("name", ["Q9_0", "int4-b48", "int4-b32-sym"])
def test_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=r"Q9_0|int4-b"):
        stored_bytes(1, 256, name)
