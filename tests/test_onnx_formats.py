"""The other side is ONNX Runtime: its quantizer's tensors, read by its own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_formats import same_bits, same_values, weights

from edgedistill.fit.formats import freeze, quantize_dequantize, quantize_on
from edgedistill.number_formats import MatMulNBits, onnx_format

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
quantizer = pytest.importorskip(
    "onnxruntime.quantization.matmul_nbits_quantizer", reason="its quantizer does not import"
)
NAMES = [
    f"int{bits}-b{block}{kind}"
    for bits in (4, 8)
    for block in (16, 32, 64, 128)
    for kind in ("", "-asym")
]
Array = NDArray[Any]


def value(name: str, kind: str, shape: list[Any]) -> Any:
    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)


def run(node: Any, inputs: list[Any], given: dict[str, Array], constants: list[Any]) -> Array:
    graph = onnx.helper.make_graph([node], "g", inputs, [value("y", "FLOAT", None)], constants)
    session = ort.InferenceSession(model(graph), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, given)[0])


def model(graph: Any) -> bytes:
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    made = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    return bytes(made.SerializeToString())


def quantized(weight: Array, made: MatMulNBits) -> tuple[Any, list[Any]]:
    """The MatMulNBits node and its constants for a MatMul by the transposed weight."""
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    matrix = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
    graph = onnx.helper.make_graph(
        [product], "g", [value("x", "FLOAT", None)], [value("y", "FLOAT", None)], [matrix]
    )
    config = quantizer.DefaultWeightOnlyQuantConfig(
        block_size=made.block, is_symmetric=made.symmetric, bits=made.bits
    )
    source = onnx.load_from_string(model(graph))
    work = quantizer.MatMulNBitsQuantizer(source, algo_config=config)
    work.process()
    (node,) = (n for n in work.model.model.graph.node if n.op_type == "MatMulNBits")
    used = set(node.input)
    return node, [c for c in work.model.model.graph.initializer if c.name in used]


def codes(packed: Array, bits: int, rows: int, count: int) -> Array:
    flat = packed.reshape(rows, -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(rows, -1)
    return np.ascontiguousarray(flat[:, :count])


def dequantized(
    node: Any, constants: list[Any], made: MatMulNBits, shape: tuple[int, int]
) -> Array:
    rows, columns = shape
    blocks = -(-columns // made.block)
    arrays = {c.name: onnx.numpy_helper.to_array(c) for c in constants}
    given = {
        "c": codes(arrays[node.input[1]], made.bits, rows, blocks * made.block),
        "s": arrays[node.input[2]].reshape(rows, blocks),
        "z": np.full((rows, blocks), 2 ** (made.bits - 1), np.uint8),
    }
    if not made.symmetric:
        given["z"] = codes(arrays[node.input[3]], made.bits, rows, blocks)
    reading = onnx.helper.make_node(
        "DequantizeLinear", ["c", "s", "z"], ["y"], axis=1, block_size=made.block
    )
    inputs = [
        value(n, k, [None, None]) for n, k in (("c", "UINT8"), ("s", "FLOAT"), ("z", "UINT8"))
    ]
    return run(reading, inputs, given, [])[:, :columns]


@pytest.mark.parametrize("columns", [512, 144])
@pytest.mark.parametrize(
    "kind", ["normal", "outliers", "ties", "zeros", "constant", "positive", "subnormal", "huge"]
)
@pytest.mark.parametrize("name", NAMES)
def test_as_onnx_runtime(name: str, kind: str, columns: int) -> None:
    weight, made = weights(kind)[:, :columns].contiguous(), onnx_format(name)
    node, constants = quantized(weight.numpy(), made)
    wanted = torch.from_numpy(dequantized(node, constants, made, (len(weight), columns)))
    value_here = quantize_dequantize(weight, name)
    assert same_bits(value_here, wanted)
    assert same_bits(quantize_on(weight, freeze(weight, name)), wanted)
    one = np.eye(columns, dtype=np.float32)
    product = run(node, [value("x", "FLOAT", [None, columns])], {"x": one}, constants)
    assert same_values(value_here, torch.from_numpy(product.T.copy()))  # a sum has no -0
