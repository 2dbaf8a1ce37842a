"""The tokenizer files of an ONNX model folder, in the shape that prompting.py reads: Hugging Face's
own have the chat template in a file beside, and special tokens as objects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgedistill.errors import ArtifactError
from edgedistill.prompting import TOKENIZER, TOKENIZER_CONFIG

TEMPLATE = "chat_template.jinja"


def write_prompt_files(model: Path, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the model, into `folder`.

    Raises:
        ArtifactError: one of them is missing or cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((model / TOKENIZER_CONFIG).read_text("utf-8"))
        for name in ("bos_token", "eos_token"):
            if isinstance(config.get(name), dict):
                config[name] = config[name]["content"]
        template = model / TEMPLATE
        if template.is_file():
            config["chat_template"] = template.read_text("utf-8")
        shutil.copyfile(model / TOKENIZER, folder / TOKENIZER)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"its tokenizer cannot be read: {error!r}",
            where=str(model),
            hint=f"{TOKENIZER} and {TOKENIZER_CONFIG} belong into an ONNX model folder",
        ) from error
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config), "utf-8")
