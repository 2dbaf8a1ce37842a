"""Figures as text, each with its unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]
NBSP = "\u00a0"  # keeps a number and its unit on one line
JOIN = "\u2060"  # keeps a range on one line behind its dash


def percent(share: float) -> str:
    """A share as per cent: one decimal place, none at the ends."""
    text = f"{share * 100:.1f}"
    return f"{text.removesuffix('.0')}{NBSP}%"


def span(interval: Json) -> str:
    """ "80.3-92.0 %" with an en dash."""
    return f"{interval['low'] * 100:.1f}–{JOIN}{interval['high'] * 100:.1f}{NBSP}%"  # noqa: RUF001


def megabytes(count: float | None) -> str:
    """Bytes as MB of 1e6 bytes, or GB of 1e9."""
    if count is None:
        return "—"
    return f"{count / 1e6:.1f}{NBSP}MB" if count < 1e9 else f"{count / 1e9:.2f}{NBSP}GB"


def small(value: float) -> str:
    """A divergence: three digits, in powers of ten below a thousandth."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}{NBSP}×{NBSP}10{raised}"  # noqa: RUF001


def duration(value: float | None) -> str:
    """Seconds in the unit that suits them."""
    if value is None:
        return "—"
    if value < 1:
        return f"{value * 1000:.3g}{NBSP}ms"
    if value < 120:
        return f"{value:.3g}{NBSP}s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}{NBSP}min {rest}{NBSP}s"


def figure(value: float, name: str) -> str:
    """A gate's figure in the unit its name tells."""
    if "agreement_drop" in name:
        return f"{value * 100:.1f} points"
    if "agreement" in name or "top1" in name or "share" in name:
        return percent(value)
    if "kld" in name:
        return f"{small(value)} nats"
    if name.endswith("_mb"):
        return f"{value:.1f} MB"
    if "tokens_per_second" in name:
        return f"{value:.1f} tokens/s"
    return f"{value:.4g}"


def relation(name: str) -> str:
    """Whether a gate's bound is the lowest or the highest allowed."""
    least = name.startswith("min_") or name.endswith(("agreement", "tokens_per_second", "top1"))
    return "≥" if least else "≤"


def label(name: str) -> str:
    """A field's name in words: "max_mean_kld" -> "max mean KLD"."""
    return name.replace("_", " ").replace("kld", "KLD").removesuffix(" mb")
