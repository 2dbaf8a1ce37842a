"""Runs llama.cpp's converter without its vocabulary step: the tokenizer keys of an export are the
base GGUF's, and the converter refuses tokenizers whose pre-tokenizer it does not recognise.

    python -m edgedistill.converter_child <llama.cpp checkout> <arguments of convert_hf_to_gguf.py>
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Replace the vocabulary step of whatever class the converter chooses, and run it."""
    folder = Path(sys.argv[1])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    conversion: Any = importlib.import_module("conversion")
    chosen = conversion.get_model_class

    def without_vocabulary(*arguments: Any, **named: Any) -> Any:
        model_class = chosen(*arguments, **named)
        model_class.set_vocab = lambda self: None
        return model_class

    conversion.get_model_class = without_vocabulary
    script = str(folder / "convert_hf_to_gguf.py")
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
