from __future__ import annotations

import pytest

from edgedistill.onnx_formats import OnnxFormat, is_format, parse_format


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("int4-b32", OnnxFormat(4, 32)),
        ("int4-b16-asym", OnnxFormat(4, 16, "asym")),
        ("int4-b128-int8head", OnnxFormat(4, 128, "", "head")),
        ("int4-b32-kquant-int8down", OnnxFormat(4, 32, "kquant", "down")),
        ("int8-b64", OnnxFormat(8, 64)),
    ],
)
def test_a_name_says_what_it_is(name: str, meaning: OnnxFormat) -> None:
    assert parse_format(name) == meaning
    assert is_format(name)


@pytest.mark.parametrize(
    "name", ["int4", "int4-b24", "int2-b32", "int8-b32-int8head", "int4-b32-int8head-asym", "fp32"]
)
def test_what_has_no_meaning(name: str) -> None:
    assert not is_format(name)
