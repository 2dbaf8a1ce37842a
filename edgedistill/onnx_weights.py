"""The weights that a quantized ONNX model holds, dequantized: what its MatMulNBits nodes mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError, MissingTool
from edgedistill.onnx_nodes import nodes_of, place_in_node

Values = npt.NDArray[np.float32]
MODEL = "model.onnx"
NUMBERS = {1: np.float32, 2: np.uint8, 10: np.float16}  # TensorProto.FLOAT, UINT8, FLOAT16


def quantized_matrices(
    folder: Path, rows: Mapping[str, int], config: Mapping[str, Any]
) -> dict[str, Callable[[], Values]]:
    """GGUF name -> function that reads its float32 matrix, rows as the checkpoint has them, for
    each of `rows` (numbers of rows) that is quantized in the model folder. `config` is the
    checkpoint's config.json.

    Raises:
        MissingTool: onnx is not installed. ArtifactError: a node is not what the builder writes.
    """
    nodes = _Nodes(folder)
    found: dict[str, Callable[[], Values]] = {}
    taken: dict[str, int] = {}
    for name in sorted(rows, key=place_in_node):
        own = nodes_of(name, config)
        if not own:
            continue
        each = rows[name] // len(own)
        found[name] = partial(nodes.joined, own, taken.get(own[0], 0), each)
        for node in own:
            taken[node] = taken.get(node, 0) + each
    for node, count in taken.items():
        if count != nodes.rows(node):
            raise ArtifactError(
                f"node {node} holds {nodes.rows(node)} rows, the checkpoint {count}",
                where=str(folder / MODEL),
            )
    return found


class _Nodes:
    def __init__(self, folder: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingTool(
                "the package onnx is not installed",
                hint='in the checkout: pip install -e ".[onnx]"',
            ) from error
        graph = onnx.load(str(folder / MODEL), load_external_data=False).graph
        self.folder = folder
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = {
            node.name.removesuffix("_Q4").removesuffix("_Q8"): node
            for node in graph.node
            if node.op_type == "MatMulNBits"
        }

    def rows(self, node: str) -> int:
        return self._attributes(node)["N"]

    def _attributes(self, node: str) -> dict[str, int]:
        if node not in self._nodes:
            raise ArtifactError(f"there is no quantized node {node}", where=str(self.folder))
        return {each.name: each.i for each in self._nodes[node].attribute}

    def joined(self, nodes: Sequence[str], start: int, rows: int) -> Values:
        """The same rows of each node, one under the other."""
        return np.concatenate([self.values(node, start, rows) for node in nodes])

    def values(self, node: str, start: int, rows: int) -> Values:
        has, given = self._attributes(node), list(self._nodes[node].input)
        if len(given) > 3 and given[3]:
            raise ArtifactError(f"node {node} has zero points", where=str(self.folder))
        part = slice(start, start + rows)
        codes = _codes(self._array(given[1])[part], has["bits"])
        scales = self._array(given[2]).reshape(has["N"], -1)[part].astype(np.float32)
        values = (codes - np.float32(2 ** (has["bits"] - 1))) * scales[:, :, None]
        return np.ascontiguousarray(values.reshape(rows, -1)[:, : has["K"]])

    def _array(self, name: str) -> Any:
        tensor = self._stored[name]
        number, shape = NUMBERS[tensor.data_type], tuple(tensor.dims)
        where = {each.key: each.value for each in tensor.external_data}
        if not where:
            return np.frombuffer(tensor.raw_data, number).reshape(shape)
        offset = int(where.get("offset", 0))
        return np.memmap(self.folder / where["location"], number, "r", offset, shape)


def _codes(stored: Any, bits: int) -> Values:
    """[rows, blocks, bytes] as float32 codes; of two codes in a byte the low half comes first."""
    if bits == 8:
        return np.asarray(stored, np.float32)
    pairs = np.stack([stored & 15, stored >> 4], axis=-1)
    codes: Values = pairs.reshape(*stored.shape[:2], -1).astype(np.float32)
    return codes
