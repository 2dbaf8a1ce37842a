"""The texts of a bundle: model card, run instructions, Ollama's Modelfile."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from edgedistill.artifacts import Student
from edgedistill.browser import WLLAMA
from edgedistill.prompting import TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import Recipe, StudentSpec
from edgedistill.report import units
from edgedistill.report.lessons import lessons_of
from edgedistill.target import Target

Json = Mapping[str, Any]
USER, SYSTEM = "edgedistill-user-text", "edgedistill-system-text"


@dataclass(frozen=True)
class Card:
    """What the texts are made from; `report` is report.json, `provenance` as for render_html."""

    recipe: Recipe
    target: Target
    student: Student
    report: Json
    provenance: Json

    def model_card(self) -> str:
        """MODEL_CARD.md with the Hugging Face hub's YAML front matter."""
        return _render("MODEL_CARD.md.jinja", self._names)

    def readme(self) -> str:
        """README.md: how to run the model."""
        onnx = self.target.runtime == "onnxruntime-genai"
        template = "README.onnx.md.jinja" if onnx else "README.md.jinja"
        return _render(template, self._names | self._commands())

    def modelfile(self) -> str:
        """Ollama's Modelfile, with the student's prompt as its template."""
        template = ollama_template(self.student, self.recipe.student)
        return _render("Modelfile.jinja", self._names | {"template": template})

    def page(self) -> dict[str, Any]:
        """What the page of a browser bundle shows."""
        report = self.report
        shipped = self._names["agreement"]["quantized"]["overall"]
        return {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "language": self.recipe.language,
            "megabytes": units.megabytes(report["model_bytes"]),
            "example": self._asked(),
            "facts": f"{report['model_file']}, {units.megabytes(report['model_bytes'])}. It gives "
            f"the teacher's answer on {units.percent(shipped['value'])} of {shipped['n']} "
            f"held-out prompts ({units.span(shipped)}). What it says may be wrong.",
        }

    def _asked(self) -> str:
        """A held-out prompt to try, if there is one with the teacher's answer."""
        shown = self.report["examples"]
        right = [example["prompt"] for example in shown if example["same"]]
        return str(next(iter(right), shown[0]["prompt"] if shown else "Hello"))

    @cached_property
    def _names(self) -> dict[str, Any]:
        prompt = StudentPrompt(self.student.folder, self.recipe.student)
        return {
            "recipe": self.recipe,
            "target": self.target,
            "student": self.student,
            "report": self.report,
            "provenance": self.provenance,
            "lessons": self.provenance.get("lessons") or lessons_of(self.recipe.distill, {}),
            "agreement": {row["model"]: row for row in self.report["agreements"]},
            "prompt_template": prompt.render("{prompt}"),
            "stop": prompt.decode([prompt.stop_id]),
            "licence": licence(self.student.licence),
            "wllama": WLLAMA if self.target.runtime == "wllama" else None,
        }

    def _commands(self) -> dict[str, str]:
        """Arguments of the run instructions, quoted for Python and for a shell."""
        asked = self._asked()
        prompt = StudentPrompt(self.student.folder, self.recipe.student)
        messages = prompt.messages(asked)
        system = self.recipe.student.system
        return {
            "messages": repr(messages),
            "asked": shlex.quote(asked),
            "user": shlex.quote(messages[-1]["content"]),
            "system": "" if system is None else f" -sys {shlex.quote(system)}",
        }


def prompt_template(student: Student, spec: StudentSpec) -> str:
    """The text the student is given, with `{prompt}` where the user's words belong."""
    return StudentPrompt(student.folder, spec).render("{prompt}")


def ollama_template(student: Student, spec: StudentSpec) -> str:
    """The student's prompt for one turn in Go's template syntax, as Ollama reads it."""
    given = {} if spec.system is None else {"system": SYSTEM}
    prompt = StudentPrompt(student.folder, spec.model_copy(update=given))
    text = prompt.render(USER)
    config = json.loads((student.folder / TOKENIZER_CONFIG).read_text("utf-8"))
    if config.get("add_bos_token"):
        # Ollama's tokenizer adds it too, and a doubled BOS changes the answers.
        text = text.removeprefix(config.get("bos_token") or "")
    text = text.replace("{{", '{{ "{{" }}')
    text = text.replace(SYSTEM, "{{ .System }}").replace(USER, "{{ .Prompt }}")
    return text + "{{ .Response }}"


def licence(name: str) -> dict[str, str]:
    """The hub's licence fields: its identifiers are lower case, anything else is "other"."""
    if re.fullmatch(r"[A-Za-z0-9.+-]+", name) and name.lower() != "unknown":
        return {"license": name.lower()}
    return {"license": "other", "license_name": name}


def _render(template: str, values: Json) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "percent": units.percent,
        "span": units.span,
        "mb": units.megabytes,
        "small": units.small,
        "duration": units.duration,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        # A cell ends at a bar, and at a line's end.
        "cell": lambda value: str(value).replace("|", "\\|").replace("\n", " "),
    }
    environment.filters |= filters
    source = files("edgedistill.report").joinpath(template).read_text("utf-8")
    return environment.from_string(source).render(values)
