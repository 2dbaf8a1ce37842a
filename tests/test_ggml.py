from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgedistill import ggml
from edgedistill.number_formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_as_the_table_says(name: str) -> None:
    assert ggml.block_size(name) == (FORMATS[name].block, FORMATS[name].bytes_per_block)


def test_many_rows_are_quantized_as_one_by_one() -> None:
    weight = np.random.default_rng(0).standard_normal((600, 1024)).astype(np.float32)
    together = ggml.quantize(weight, "Q4_K")
    assert together.shape == (600, 4 * 144)
    assert np.array_equal(together[[0, 599]], ggml.quantize(weight[[0, 599]], "Q4_K"))
    back = ggml.dequantize(together, "Q4_K", 1024)
    assert np.array_equal(ggml.quantize_dequantize(weight, "Q4_K"), back)
    assert 0 < np.abs(back - weight).mean() < 0.1


def test_shapes_that_do_not_fit() -> None:
    weight = np.zeros((2, 256), np.float32)
    with pytest.raises(ValueError, match="blocks"):
        ggml.quantize(weight[:, :96], "Q4_K")
    with pytest.raises(ValueError, match="importance"):
        ggml.quantize(weight, "Q4_K", np.ones(255, np.float32))
    with pytest.raises(ValueError, match="bytes"):
        ggml.dequantize(np.zeros((2, 143), np.uint8), "Q4_K", 256)


def test_the_package_is_not_imported() -> None:
    code = (
        "import sys, edgedistill.ggml as g; g.block_size('Q4_0'); print('llama_cpp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
