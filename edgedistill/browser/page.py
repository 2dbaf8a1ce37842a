"""The page of a browser bundle, and what it must know of the student: `web/student.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from edgedistill.artifacts import digest_of_file
from edgedistill.errors import RuntimeFailure
from edgedistill.prompting import StudentPrompt

WEB = "web"
CONFIG = f"{WEB}/student.json"
# Emscripten's ftell is 32 bits wide, so wllama reads no file beyond it; a larger one must be split.
LARGEST_MODEL_BYTES = 2**31 - 1
MARK = "edgedistill-user-text"
SPACED = f"  {MARK}\n "


def student_config(
    model: Path, prompt: StudentPrompt, *, max_tokens: int, context_tokens: int
) -> dict[str, Any]:
    """What the page needs to prompt and run a GGUF file exactly as it was trained and measured.

    `parts` are joined by the user's text, which is trimmed before where the chat template does so.

    Raises:
        RuntimeFailure: the file is too large for wllama, or the chat template does something to
            the user's text that the page does not know.
    """
    size = model.stat().st_size
    if size > LARGEST_MODEL_BYTES:
        raise RuntimeFailure(
            f"{size / 1e9:.2f} GB are too much for a browser: wllama reads files up to 2 GB",
            where=str(model),
            hint="choose a smaller student or a smaller format",
        )
    parts = prompt.render(MARK).split(MARK)
    spaced = prompt.render(SPACED)
    trim = spaced == SPACED.strip().join(parts)
    if not trim and spaced != SPACED.join(parts):
        raise RuntimeFailure(
            "the chat template changes the user's text in a way that the page cannot repeat",
            hint="blanks around a prompt are rendered as " + repr(spaced),
        )
    with_bos, without = prompt.prompt_ids(MARK), prompt.encode(prompt.render(MARK))
    return {
        "model": model.name,
        "bytes": size,
        "sha256": digest_of_file(model),
        "context_tokens": context_tokens,
        "max_tokens": max_tokens,
        "parts": parts,
        "trim": trim,
        "bos": with_bos[0] if len(with_bos) > len(without) else None,
        "stop": sorted(prompt.stop_ids),
    }


def page_files(
    config: Mapping[str, Any], shown: Mapping[str, Any], runtime: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every file of the page by its path in the bundle, but for the model.

    Args:
        config: made by `student_config`.
        shown: for the page's text: name, description, format, megabytes, example, facts.
        runtime: wllama's files by name.
    """
    pages = files("edgedistill.browser").joinpath("pages")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(pages.joinpath("index.html.jinja").read_text("utf-8"))
    made = {"index.html": template.render(shown).encode()}
    for name in ("app.js", "student.js", "page.css"):
        made[f"{WEB}/{name}"] = pages.joinpath(name).read_bytes()
    made[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return made | {f"{WEB}/wllama/{name}": body for name, body in runtime.items()}


def measuring_files(config: Mapping[str, Any], runtime: Mapping[str, bytes]) -> dict[str, bytes]:
    """The page that measures: the bundle's own code, without the parts that are looked at."""
    pages = files("edgedistill.browser").joinpath("pages")
    made = {name: pages.joinpath(name).read_bytes() for name in ("measure.html", "measure.js")}
    made[f"{WEB}/student.js"] = pages.joinpath("student.js").read_bytes()
    made[CONFIG] = json.dumps(config).encode()
    return made | {f"{WEB}/wllama/{name}": body for name, body in runtime.items()}
