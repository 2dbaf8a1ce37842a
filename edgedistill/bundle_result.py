"""A bundle as a result: what its build measured, as far as its report tells.

Speed is of one process, so its interval is not known, nor is what else the machine did; agreement
has its interval, but the answers are not in a bundle, so no paired test can be made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.artifacts import digest_of
from edgedistill.errors import ArtifactError
from edgedistill.measures import Measure, measure
from edgedistill.result_file import Result, require_whole

MANIFEST, REPORT, STAGE = "manifest.json", "report.json", "pack"
MEASURED = "measured"  # latency_kind, where the device is the machine that has built
IN_PROCESS = "student in process"  # timed as a sitting times it
PERCENTILES = ("p50", "p95", "p99")
LINK = ("step", "before", "after", "mean_kld", "top1", "agreement_before", "agreement_after",
        "prompts", "passed")  # fmt: skip
TIMED = (
    "a bundle: its speed is of one process of its build, other work on the machine was not "
    "listened to, and its answers are not in it"
)
NOT_TIMED = (
    "a bundle: its build did not measure speed on this machine, and its answers are not in it"
)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is one, or another stage's."""
    return (folder / MANIFEST).is_file()


def read_bundle(folder: Path) -> Result:
    """The result of its build.

    Raises:
        ArtifactError: it is no bundle, or its manifest or report cannot be read.
    """
    manifest = _read(folder / MANIFEST)
    if manifest.get("stage") != STAGE:
        raise ArtifactError(
            f"this is no bundle, but a folder of the stage {manifest.get('stage')}",
            where=str(folder), hint="bundles are in dist/",
        )  # fmt: skip
    report = _read(folder / REPORT)
    try:
        result = _result(folder, manifest, report)
        require_whole(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder / REPORT, error) from error
    return result


def bundle_facts(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a result of its file keeps of a bundle: what it is of, the dataset it was measured on,
    and its fidelity chain; None for what an older bundle lacks or cannot be read."""
    bench = manifest.get("provenance", {}).get("bench", {})
    try:
        chain = chain_of(_read(folder / REPORT))
    except (ArtifactError, KeyError, TypeError):
        chain = None
    return {
        "recipe": manifest["spec"]["recipe"]["name"],
        "target": manifest["spec"]["target"]["name"],
        "key": manifest["key"],
        "dataset": bench.get("inputs", {}).get("dataset"),
        "chain": chain,
    }


def chain_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The hand-overs of a build, in order: KLD in nats a token, agreements as shares of all
    held-out prompts or of so many. What a browser makes of the file is the last one."""
    links = [{name: link.get(name) for name in LINK} for link in report["links"]]
    page = report.get("in_browser")
    if page is not None and page["agreement"] is not None:
        kld = page["kld"] or {}
        links.append(
            {"step": "browser", "before": "quantized", "after": "in a browser",
             "mean_kld": kld.get("mean_kld"), "top1": kld.get("top1"),
             "agreement_before": page["agreement_native"]["value"],
             "agreement_after": page["agreement"]["value"],
             "prompts": page["prompts"], "passed": True}
        )  # fmt: skip
    return links


def _result(folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> Result:
    machine, bench = report["machine"], manifest["provenance"]["bench"]
    agreed = {row["model"]: row["overall"] for row in report["agreements"]}.get("quantized")
    prompt, name = bench["spec"]["prompt"], manifest["facts"]["model"]
    files = manifest["outputs"]
    runs = report["llama_bench"]
    figures = _figures(report) if report["latency_kind"] == MEASURED else {}
    return Result(
        made=manifest["started"].replace("Z", "+00:00"),
        edgedistill=manifest["tools"]["edgedistill"],
        model={
            "name": Path(name).stem if name in files else name, "file": name,
            "sha256": _sha256(files, name),
            "bytes": int(report["model_bytes"]), "types": {report["format"]: None},
            "bundle": bundle_facts(folder, manifest),
        },
        device={"address": "local", "cpu": machine["cpu"], "fingerprint": machine["fingerprint"],
                **machine, "runtime": _runtime(bench)},
        load={"before": None, "during": None, "busy": None},
        conditions={},
        settings={"processes": 1, "threads": runs[0]["threads"] if runs else None,
                  "max_tokens": prompt["max_tokens"], "system": prompt["system"]},
        figures=figures,
        token_mix={
            "source": f"held-out prompts of {report['recipe']}", "digest": None,
            "prompts": report["counts"]["held_out"], "dataset": bench["inputs"]["dataset"],
        },
        check=bench["spec"]["check"],
        likeness={"rows": [], "agreement": agreed, "gold": None, "threw": {}, "unlike": 0},
        notes=[TIMED if figures else NOT_TIMED],
    )  # fmt: skip


def _figures(report: Mapping[str, Any]) -> dict[str, Measure]:
    """Those that a sitting has, too, and measures in the same way."""
    figures = {
        each["test"]: measure([[each["mean"]]], "tokens/s") for each in report["llama_bench"]
    }
    timed = next((row for row in report["latencies"] if row["who"] == IN_PROCESS), None)
    if timed is None:
        return figures
    for name in PERCENTILES:
        whole, first = timed["end_to_end_seconds"], timed["time_to_first_token"][name]
        figures[f"end_to_end_{name}"] = measure([whole], "s", name)
        figures[f"time_to_first_token_{name}"] = measure([[first]], "s", name)
    for name, field, unit in (
        ("cold_start", "cold_start_seconds", "s"), ("peak_memory", "peak_memory_bytes", "bytes"),
    ):  # fmt: skip
        if timed[field] is not None:
            figures[name] = measure([[timed[field]]], unit)
    return figures


def _sha256(outputs: Mapping[str, Any], name: str) -> str:
    """Of the model's file, or as model_prompt has it of a folder: over those of its files."""
    if name in outputs:
        return str(outputs[name]["sha256"])
    start = f"{name}/"
    inside = {file: each["sha256"] for file, each in outputs.items() if file.startswith(start)}
    return digest_of({file.removeprefix(start): sha for file, sha in sorted(inside.items())})


def _runtime(bench: Mapping[str, Any]) -> dict[str, Any]:
    name = bench["spec"]["target"].get("runtime", "llama.cpp")
    package = "onnxruntime-genai" if name.startswith("onnx") else "llama-cpp-python"
    return {"name": name, package: bench["tools"].get(package)}


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise _damaged(file, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is incomplete, cut off or damaged: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(file, "it holds no object")
    return value


def _damaged(file: Path, error: Exception | str) -> ArtifactError:
    what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    if isinstance(error, OSError):
        what = error.strerror or what
    return ArtifactError(
        f"this part of a bundle cannot be used: {what}", where=str(file),
        hint="build the bundle again, or measure its model: edgedistill bench FOLDER --out FILE",
    )  # fmt: skip
