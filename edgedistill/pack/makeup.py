"""How the file that ships was made, for its model card and report: number formats, trimming and
fitting, which a stock file has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from edgedistill.artifacts import Quantized
from edgedistill.converter import CONVERTER
from edgedistill.gguf_header import read_header

Json = Mapping[str, Any]


def makeup(quantized: Quantized, chain: Mapping[str, Json]) -> dict[str, Any]:
    """`numbers`: the number formats of its matrices, in words; `fit` and `drop_layers`: what its
    allocation asked for, and `vocabulary`: how many tokens are left, None where nothing of that
    was done;
    `left_unfitted`: why a fitting that was asked for left the student as it was, or None;
    `converter`: "llama.cpp converter <digest>" where that wrote the file before it was quantized,
    None where edgedistill itself or another runtime's builder did."""
    of = f" of {quantized.format}"
    own = {name.removesuffix(of): each for name, each in chain.items() if name.endswith(of)}
    made: dict[str, Any] = {
        "numbers": _numbers(quantized, own),
        "fit": None,
        "left_unfitted": None,
        "vocabulary": None,
        "drop_layers": None,
        "converter": _converter({**chain, **own}),
    }
    for each in own.values():
        if each["stage"] == "fit":
            facts = each["facts"]
            left = {"left_unfitted": _why_left(facts)}
            made |= left if facts["start_stays"] else {"fit": each["spec"]["fit"]}
        if each["stage"] == "trim":
            made |= _trimmed(each)
    return made


def _converter(chain: Mapping[str, Json]) -> str | None:
    path = chain["export"]["facts"].get("path", "") if "export" in chain else ""  # ONNX has none
    return str(path) if path.startswith(CONVERTER) else None


def _trimmed(each: Json) -> dict[str, Any]:
    made, spec = {}, each["spec"]
    if spec.get("vocabulary") is not None:  # 0 keeps what the training prompts use
        made["vocabulary"] = each["facts"]["tokens"]
    if spec.get("drop_layers"):
        made["drop_layers"] = spec["drop_layers"]
    return made


def _why_left(facts: Json) -> str:
    kld = facts["start_kld"]
    apart = "" if kld is None else f" (KL divergence {kld:.2g} nats a token on altered prompts)"
    if not facts["steps"]:
        return (
            "rounded to its number formats, the student was close to the unquantized one as it "
            f"was{apart}"
        )
    return f"none of {facts['steps']} steps made it better than it was when rounded{apart}"


def _numbers(quantized: Quantized, own: Mapping[str, Json]) -> str:
    if quantized.model.is_dir():  # ONNX: a format says what it is, an allocation lists its types
        return ", ".join(own["allocate"]["spec"]["types"]) if "allocate" in own else ""
    held = Counter(t.type for t in read_header(quantized.model).tensors if len(t.shape) > 1)
    return ", ".join(f"{kind} ({count})" for kind, count in held.most_common())
