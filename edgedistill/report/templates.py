"""The pages' templates and style, as this folder has them."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from edgedistill.report import units
from edgedistill.report.units import duration, label, megabytes, percent, span


def css() -> Markup:
    """The style of every page."""
    return Markup(_read("report.css"))


def _read(name: str) -> str:
    return files("edgedistill.report").joinpath(name).read_text("utf-8")


def environment() -> Environment:
    """Templates of this folder, and how they write figures."""
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_read),
    )
    made.filters |= {
        "percent": percent,
        "span": span,
        "mb": megabytes,
        "small": units.small,
        "duration": duration,
        "figure": units.figure,
        "label": label,
        "relation": units.relation,
        "svg": Markup,  # only for drawings of plots.py, which escapes their text itself
    }
    return made
