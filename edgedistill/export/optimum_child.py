"""Run by optimum.py with the Python of optimum's own environment, which has no edgedistill.

One JSON request on stdin, the answer as JSON in the file named by the one argument (see
`run_script` in own_environment.py). Start it with -I: this folder has modules of the same names as
packages it needs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

TASK = "text-generation-with-past"
EXTERNAL_BYTES = 1_900_000_000  # protobuf ends at 2 GiB: beyond, weights lie in a file of their own
BLOCK = 32  # weights that share a scale, along the input
HEAD_BITS = 8


class Refused(Exception):
    """It cannot be done; the text is for the user."""


def export(checkpoint: str, config: dict[str, Any], scratch: str, into: str) -> dict[str, Any]:
    """The fp32 model at `into`; a tied head is stored once. `scratch`: a folder that is there."""
    import torch
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            kind, exporter="onnx", library_name="transformers"
        )
    except KeyError:
        tasks = {}
    if TASK not in tasks:
        raise Refused(f"optimum cannot export the architecture {kind!r} for text generation")
    own = {name: value for name, value in config.items() if name != "model_type"}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        config=AutoConfig.for_model(kind, **own),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    # It also writes a config and a tokenizer of its own making; ours are shipped.
    onnx_export_from_model(model, scratch, task=TASK, do_validation=False, device="cpu")
    del model
    found = _loaded(Path(scratch, "model.onnx"))
    tied = _tie(found)
    _save(found, Path(into))
    return {"tied": tied, "nodes": len(found.graph.node), "opset": found.opset_import[0].version}


def quantize(source: str, into: str, bits: int) -> dict[str, Any]:
    """Weight-only: matrices in `bits`, embedding and head in 8, symmetric blocks along the input.

    MatMulNBits and GatherBlockQuantized of ONNX Runtime's com.microsoft domain.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = _loaded(Path(source))
    embedding = _quantize_embedding(model)
    heads = [node.name for node in model.graph.node if _is_head(node, model)]
    for width, names in ((HEAD_BITS, heads), (bits, None)):
        if names == []:
            continue
        quantizer = MatMulNBitsQuantizer(
            model, bits=width, block_size=BLOCK, is_symmetric=True, nodes_to_include=names
        )
        quantizer.process()
        model = quantizer.model.model
    _save(model, Path(into))
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.domain == "com.microsoft":
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {"bits": bits, "embedding_bits": HEAD_BITS if embedding else 32, "operators": counts}


def tokens(folder: str, texts: list[str], talks: list[dict[str, Any]]) -> dict[str, Any]:
    """Token IDs, rendered conversations and end tokens as this transformers sees the folder."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "rendered": [tokenizer.apply_chat_template(**talk, tokenize=False) for talk in talks],
        "ends": ends if isinstance(ends, list) else [ends],
    }


def logits(folder: str, file: str, rows: list[tuple[list[int], int]], into: str) -> int:
    """Append float32 rows [len(ids) - first, vocab] that predict ids[first:]; their number."""
    import numpy as np
    import torch

    model, count = _runtime(folder, file), 0
    with Path(into).open("ab") as stream:
        for ids, first in rows:
            given = torch.tensor([ids[:-1]])
            found = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
            wanted = found[first - 1 :].float().numpy()
            stream.write(np.ascontiguousarray(wanted, np.float32).tobytes())
            count += len(wanted)
    return count


def answers(folder: str, file: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers with the end token, where there was one."""
    import torch

    model = _runtime(folder, file)
    made = []
    for ids in prompts:
        given = torch.tensor([ids])
        found = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        made.append(found[0, len(ids) :].tolist())
    return made


def _runtime(folder: str, file: str) -> Any:
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    options = SessionOptions()
    # Threads that wait by spinning stand still on a machine that is busy with something else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ORTModelForCausalLM.from_pretrained(
        folder, file_name=file, local_files_only=True, session_options=options
    )


# The graph


def _loaded(file: Path) -> Any:
    import onnx

    return onnx.load(file)


def _save(model: Any, into: Path) -> None:
    import onnx

    size = sum(len(one.raw_data) for one in model.graph.initializer)
    external: dict[str, Any] = {
        "save_as_external_data": size > EXTERNAL_BYTES,
        "location": f"{into.name}_data",
        "all_tensors_to_one_file": True,
    }
    onnx.save(model, into, **external)


def _initializers(model: Any) -> dict[str, Any]:
    return {one.name: one for one in model.graph.initializer}


def _embedding(model: Any) -> Any:
    """The node that looks up the rows of token IDs."""
    known = _initializers(model)
    found = (n for n in model.graph.node if n.op_type == "Gather" and n.input[1] == "input_ids")
    return next((node for node in found if node.input[0] in known), None)


def _is_head(node: Any, model: Any) -> bool:
    return node.op_type == "MatMul" and "logits" in node.output


def _head(model: Any) -> Any:
    return next((node for node in model.graph.node if _is_head(node, model)), None)


def _tie(model: Any) -> bool:
    """Replace a head that holds the embedding's values once more by a view of the embedding."""
    import numpy as np
    from onnx import helper, numpy_helper

    lookup, head, known = _embedding(model), _head(model), _initializers(model)
    if lookup is None or head is None or head.input[1] not in known:
        return False
    rows = numpy_helper.to_array(known[lookup.input[0]])
    copy = known[head.input[1]]
    if tuple(copy.dims) != rows.shape[::-1] or not np.array_equal(
        numpy_helper.to_array(copy), rows.T
    ):
        return False
    view = helper.make_node(
        "Transpose", [lookup.input[0]], [copy.name], name="tied_head", perm=[1, 0]
    )
    model.graph.initializer.remove(copy)
    model.graph.node.insert(0, view)  # nodes are in the order in which they can run
    return True


def _quantize_embedding(model: Any) -> bool:
    """The embedding in 8 bits, and the head on the same bytes where they are tied."""
    import numpy as np
    from onnx import helper, numpy_helper

    lookup, known = _embedding(model), _initializers(model)
    if lookup is None:
        return False
    values = numpy_helper.to_array(known[lookup.input[0]])
    count, width = values.shape
    if width % BLOCK:
        return False
    blocks = values.reshape(count, width // BLOCK, BLOCK)
    scales = np.abs(blocks).max(2) / 127
    steps = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None])
    name = lookup.input[0]
    stored = {
        "values": (steps + 128).astype(np.uint8).reshape(count, width),
        "scales": scales.astype(np.float32),
        "zeros": np.full(scales.shape, 128, np.uint8),
    }
    for part, array in stored.items():
        model.graph.initializer.append(numpy_helper.from_array(array, f"{name}.{part}"))
    values_name, scales_name, zeros_name = (f"{name}.{part}" for part in stored)
    _replace(model, lookup, helper.make_node(
        "GatherBlockQuantized", [values_name, lookup.input[1], scales_name, zeros_name],
        list(lookup.output), name=lookup.name, domain="com.microsoft",
        bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1,
    ))  # fmt: skip
    _tie_quantized(model, name, stored["values"].shape)
    if not any(name in node.input for node in model.graph.node):
        model.graph.initializer.remove(known[name])
    if not any(one.domain == "com.microsoft" for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return True


def _tie_quantized(model: Any, name: str, shape: tuple[int, int]) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    head = _head(model)
    views = [node for node in model.graph.node if node.op_type == "Transpose"]
    view = next((node for node in views if list(node.input) == [name]), None)
    if head is None or view is None or head.input[1] != view.output[0]:
        return
    count, width = shape
    wanted = {
        "values": ([count, width // BLOCK, BLOCK], f"{name}.head_values"),
        "scales": ([count * width // BLOCK], f"{name}.head_scales"),
    }
    for part, (dims, made) in wanted.items():
        dims_name = f"{made}.shape"
        model.graph.initializer.append(numpy_helper.from_array(np.array(dims, np.int64), dims_name))
        reshape = helper.make_node("Reshape", [f"{name}.{part}", dims_name], [made], name=made)
        model.graph.node.insert(0, reshape)
    _replace(model, head, helper.make_node(
        "MatMulNBits", [head.input[0], *(made for _, made in wanted.values())],
        list(head.output), name=head.name, domain="com.microsoft",
        K=width, N=count, bits=8, block_size=BLOCK,
    ))  # fmt: skip
    model.graph.node.remove(view)


def _replace(model: Any, old: Any, new: Any) -> None:
    nodes = model.graph.node
    at = next(i for i, node in enumerate(nodes) if node is old or node == old)
    nodes.insert(at, new)
    nodes.remove(old)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be ours when the interpreter ends
        pass
    os._exit(1)


def main(answer: Path) -> None:
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    do = {f.__name__: f for f in (export, quantize, tokens, logits, answers)}
    try:
        value: dict[str, Any] = {"ok": do[request.pop("do")](**request)}
    except Refused as error:
        value = {"error": str(error)}
    except OSError as error:
        if error.errno is None:  # a library's own, of this name only
            raise
        value = {"error": str(error), "errno": error.errno, "file": error.filename}
    temporary = answer.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), "utf-8")
    os.replace(temporary, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
