"""The matrices that a quantized model file holds, dequantized, whichever runtime it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.ggml import dequantize
from edgedistill.onnx_nodes import nodes_of
from edgedistill.onnx_weights import quantized_matrices
from edgedistill.tensors import Layout, Tensor, matrices

Values = npt.NDArray[np.float32]


def read_matrices(model: Path, layout: Layout) -> dict[str, Callable[[], Values]]:
    """GGUF name -> function that reads the float32 matrix [rows, columns], its rows as in the
    checkpoint of `layout`. `model` is a GGUF file, or an ONNX model folder, where matrices that are
    not quantized are left out.

    Raises:
        ArtifactError: the model is not one of this checkpoint. MissingTool: see ggml, onnx_weights.
    """
    if model.is_dir():
        rows = {name: shape[1] for name, shape in matrices(layout).items()}
        return quantized_matrices(model, rows, layout.config)
    return _of_gguf(model, layout)


def _of_gguf(file: Path, layout: Layout) -> dict[str, Callable[[], Values]]:
    from gguf import GGUFReader

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    named = matrices(layout)

    def reader(tensor: Tensor) -> Callable[[], Values]:
        held = stored[tensor.name]

        def read() -> Values:
            values = dequantize(held.data.view(np.uint8), held.tensor_type.name, tensor.shape[1])
            return tensor.in_checkpoint_order(values.reshape(tensor.shape))

        return read

    return {tensor.name: reader(tensor) for tensor in layout.tensors if tensor.name in named}


def stored_together(layout: Layout, onnx: bool) -> dict[str, str]:
    """Each matrix that a quantized model of the checkpoint stores in a format of its own -> what
    shares that format: in an ONNX model one node may hold several."""
    if not onnx:
        return {name: name for name in matrices(layout)}
    nodes = {name: nodes_of(name, layout.config) for name in matrices(layout)}
    return {name: own[0] for name, own in nodes.items() if own}
