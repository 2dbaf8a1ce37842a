"""onnxruntime-genai's model builder in a process of its own: `python -m
edgedistill.onnx_builder_child`, started by onnx_builder.py. It is run by its command line, which
changes less between versions than its functions.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from edgedistill.answering import Refused, answer_requests

MODULE = "onnxruntime_genai.models.builder"


def build(words: list[str], seen: dict[str, Any]) -> None:
    """Run the builder with these command-line words; `seen` goes before what it reads in
    config.json."""
    sys.argv = [MODULE, *words]
    _show(seen)
    try:
        runpy.run_module(MODULE, run_name="__main__")
    except ModuleNotFoundError:
        raise  # ends this process; the parent finds the package's name in the last lines
    except SystemExit as end:
        if end.code:
            raise Refused(f"the builder ended with {end.code}") from end
    except OSError:
        raise
    except Exception as error:  # whatever it could not do
        raise Refused(f"{type(error).__name__}: {error}") from error


def _show(seen: dict[str, Any]) -> None:
    """Let the builder see other values in the config; transformers, which reads the weights and is
    known by asking for what it did not use, sees those of the file."""
    from transformers.models.auto.configuration_auto import AutoConfig

    read = AutoConfig.from_pretrained

    def from_pretrained(*given: Any, **named: Any) -> Any:
        config = read(*given, **named)
        if not named.get("return_unused_kwargs"):
            for name, value in seen.items():
                setattr(config, name, value)
        return config

    if seen:
        AutoConfig.from_pretrained = staticmethod(from_pretrained)


def reconnect_embedding(file: str, block: int) -> int:
    """Name the head's matrix, which a tied embedding reads, as it is named in the file; the number
    of inputs changed.

    The builder (0.18.0, make_tied_quantized_embedding_input_names) expects other names for an
    8-bit head in its default method than the quantizer gives, and ORT refuses the file.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    known = {tensor.name for tensor in model.graph.initializer}
    head = "lm_head.MatMul.weight"
    renamed = {f"{head}_Q8G{block}": f"{head}_Q8", f"{head}_scale": f"{head}_scales"}
    changed = 0
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name not in known and renamed.get(name) in known:
                node.input[i] = renamed[name]
                changed += 1
    if changed:
        onnx.save(model, file)
    return changed


def _answer(do: str, given: dict[str, Any]) -> Any:
    if do == "build":
        return build(**given)
    return reconnect_embedding(**given)


def main() -> None:
    # A checkpoint lies in a folder: nothing is looked up on a hub.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    answer_requests(_answer)


if __name__ == "__main__":
    main()
