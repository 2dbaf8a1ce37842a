"""How results are shown: each function takes the plain data that `--json` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgedistill.console import duration, size

if TYPE_CHECKING:
    from edgedistill.pipeline import BuildResult

Row = Mapping[str, Any]
STATES = {"ok": "green", "note": "yellow", "missing": "red"}


def plain(rows: Sequence[Any]) -> list[Any]:
    """Rows as JSON holds them, so that a table and `--json` show the same."""
    values = [list(row) if isinstance(row, tuple) else asdict(row) for row in rows]
    return list(json.loads(json.dumps(values, default=str)))


def build_value(
    recipe: str, results: Sequence[BuildResult], ran: set[str], seconds: float
) -> dict[str, Any]:
    """A build as plain data; `ran` holds the names of the stage folders that were made now."""
    return {
        "recipe": recipe,
        "seconds": round(seconds, 3),
        "targets": [_target_value(result, ran) for result in results],
    }


def _target_value(result: BuildResult, ran: set[str]) -> dict[str, Any]:
    bundle = result.bundle
    page = bundle and bundle.folder / "report.html"
    paths = bundle and {
        "folder": str(bundle.folder),
        "model": str(bundle.model),
        "report": str(page) if page and page.is_file() else None,
        "digest": bundle.digest,
    }
    stages = [
        {
            "stage": name,
            "key": manifest["key"],
            "folder": _folder_name(manifest, result),
            "reused": _folder_name(manifest, result) not in ran,
            "wall_seconds": manifest["wall_seconds"],
            "peak_memory_bytes": manifest["peak_memory_bytes"],
            "digest": manifest["digest"],
        }
        for name, manifest in result.stages.items()
    ]
    return {
        "target": result.target.name,
        "stages": stages,
        "report": result.report,
        "bundle": paths,
    }


def _folder_name(manifest: Row, result: BuildResult) -> str:
    """A bundle has a name of its own; every other stage folder has its key in it."""
    if manifest["stage"] == "pack" and result.bundle is not None:
        return result.bundle.folder.name
    return f"{manifest['stage']}-{manifest['key']}"


def build(value: Row) -> RenderableType:
    """The final view of a build: what each target got, and what it cost."""
    parts: list[RenderableType] = []
    for target in value["targets"]:
        parts.append(_heading(value["recipe"], target))
        if target["report"]:
            parts += _report(target["report"])
        parts.append(_stages(target["stages"]))
        if target["bundle"]:
            parts.append(line("bundle", target["bundle"]["folder"]))
            if target["bundle"]["report"]:
                parts.append(line("report", target["bundle"]["report"]))
    parts.append(line("total", duration(value["seconds"])))
    return Group(*parts)


def _heading(recipe: str, target: Row) -> Text:
    report = target["report"]
    text = f"\n{recipe} on {target['target']}"
    if report:
        text += (
            f": {report['model_file']}, {report['format']}, {report['model_bytes'] / 1e6:.1f} MB"
        )
    return Text(text, style="bold")


def _report(report: Row) -> list[RenderableType]:
    parts: list[RenderableType] = [_agreements(report["agreements"]), _chain(report["links"])]
    if report["latencies"]:
        parts.append(_latencies(report["latencies"]))
    if report["speedup_p50"]:
        ratio = f"{report['speedup_p50']:.1f} times the teacher's (end to end, p50)"
        parts.append(line("speed", ratio))
    if report["estimate"]:
        parts.append(_estimate(report["estimate"]))
    return parts


def _agreements(agreements: Sequence[Row]) -> Table:
    table = table_of("agreement with the teacher (95 % interval)", "all", "seen", "unseen")
    for row in agreements:
        table.add_row(row["model"], *(interval(row[k]) for k in ("overall", "seen", "unseen")))
    return table


def interval(share: Row | None) -> str:
    if share is None:
        return "-"
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f}, n={share['n']})"


def _chain(links: Sequence[Row]) -> Table:
    table = table_of("step", "mean KLD", "p99 KLD", "top-1", "agreement", "gate")
    for link in links:
        table.add_row(
            f"{link['step']} ({link['before']} to {link['after']}{_prompts(link)})",
            f"{link['mean_kld']:.2g}",
            f"{link['p99_kld']:.2g}",
            f"{link['top1']:.4f}",
            f"{100 * link['agreement_before']:.1f} to {100 * link['agreement_after']:.1f} %",
            "[green]passed[/]" if link["passed"] else "[red]missed[/]",
        )
    return table


def _prompts(link: Row) -> str:
    return "" if link.get("prompts") is None else f", {link['prompts']} prompts"


def _latencies(latencies: Sequence[Row]) -> Table:
    table = table_of(
        "latency", "first token p50", "end to end p50 / p95 / p99", "tokens/s", "memory"
    )
    for row in latencies:
        whole = " / ".join(f"{1000 * row['end_to_end'][key]:.0f}" for key in ("p50", "p95", "p99"))
        memory = row["peak_memory_bytes"]
        table.add_row(
            row["who"],
            f"{1000 * row['time_to_first_token']['p50']:.0f} ms",
            f"{whole} ms",
            f"{row['tokens_per_second']['p50']:.0f}",
            size(memory) if memory else "-",
        )
    return table


def _estimate(estimate: Row) -> Text:
    return line(
        "estimate",
        f"{estimate['tokens_per_second']:.0f} tokens/s, first token "
        f"{1000 * estimate['time_to_first_token']:.0f} ms, end to end "
        f"{1000 * estimate['end_to_end_p50']:.0f} ms (roofline estimate, not measured)",
    )


def _stages(stages: Sequence[Row]) -> Table:
    table = table_of("stage", "wall", "peak memory", "", "folder")
    for row in stages:
        table.add_row(
            row["stage"],
            duration(row["wall_seconds"]),
            size(row["peak_memory_bytes"]),
            "reused" if row["reused"] else "made",
            row["folder"],
        )
    return table


def recipes(rows: Sequence[Row]) -> Table:
    table = table_of("recipe", "", "what it does", "teacher", "student", "check")
    for row in rows:
        said = escape(row.get("description") or "") or "[red]does not validate[/]"
        names = (escape(row.get(key, "")) for key in ("teacher", "student", "check"))
        table.add_row(row["name"], row["origin"], said, *names)
    return table


def targets(rows: Sequence[Row]) -> Table:
    table = table_of("target", "", "device", "runtime", "formats", "latency", "memory (MB)")
    for row in rows:
        if "problem" in row:
            table.add_row(row["name"], row["origin"], "[red]does not validate[/]")
            continue
        made = [*row["formats"], *(f"{name} (own)" for name in row["allocations"])]
        formats, memory = " ".join(made), f"{row['memory_budget_mb']:.0f}"
        device = escape(row["description"])
        table.add_row(
            row["name"], row["origin"], device, row["runtime"], formats, row["latency"], memory
        )
    return table


def target(rows: Sequence[Row]) -> Table:
    table = table_of("field", "value", "what it is", "where the value comes from")
    table.columns[0].no_wrap = True  # a name in two parts can be neither found nor copied
    for row in rows:
        value = row["value"]
        text = " ".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        table.add_row(row["field"], *(escape(t) for t in (text, row["meaning"], row["source"])))
    return table


def validated(value: Row) -> Text:
    recipes = ", ".join(f"{name} ({count} prompts)" for name, count in value["recipes"].items())
    names = ", ".join(value["targets"])
    return Text(f"valid: recipes {recipes or 'none'}; targets {names or 'none'}")


def status(value: Row) -> RenderableType:
    table = table_of("folder", "", "size", "age", "used by")
    for row in value["folders"]:
        table.add_row(
            row["folder"].replace("\\", "/").rpartition("/")[2],
            "complete" if row["complete"] else "[yellow]unfinished[/]",
            size(row["bytes"]),
            duration(row["age_seconds"]),
            ", ".join(row["recipes"]) or "[dim]no recipe here[/]",
        )
    plan = table_of("a build would", "stage", "folder")
    for stage, state, folder in value["plan"]:
        would = "reuse" if state == "reused" else "[bold]start at[/]"
        plan.add_row(would, stage, folder.replace("\\", "/").rpartition("/")[2])
    return Group(
        line("workspace", f"{value['workspace']}{', a build runs' if value['in_use'] else ''}"),
        line("teacher answers", size(value["traces_bytes"])),
        *([table] if value["folders"] else []),
        plan,
        *[line("the build ends", error) for error in value["ends"]],
        *[line("left out, does not validate", problem) for problem in value["problems"]],
    )


def swept(value: Row) -> Table:
    """A sweep's trials."""
    table = table_of("", "learning rate", "rank", "epochs", "steps", "agreement", "NLL", "time", "")
    for place, trial in enumerate(value["trials"]):
        last = trial["exams"][-1] if trial["exams"] else None
        done = trial["steps"] if trial["stopped_at"] is None else trial["stopped_at"]
        how = ["[green]best[/]"] if place == value["winner"] else []
        how += ["the recipe's own"] if trial["own"] else []
        table.add_row(
            str(place + 1),
            f"{trial['learning_rate']:g}",
            "-" if trial["rank"] is None else str(trial["rank"]),
            f"{trial['epochs']:g}",
            f"{done} of {trial['steps']}",
            f"{100 * last['agreement']:.1f} %" if last else "-",
            f"{last['nll']:.3f}" if last else "-",
            duration(trial["seconds"]),
            ", ".join([*how, *([escape(trial["why"])] if trial["why"] else [])]),
        )
    return table


def learning_curve(value: Row) -> Table:
    """Agreement by training rows."""
    table = table_of("training rows", "steps", "agreement (95 % interval)", "NLL", "time")
    for point in value["points"]:
        row = f"{point['rows']:,}", str(point["steps"]), interval(point["agreement"])
        table.add_row(*row, f"{point['nll']:.3f}", duration(point["seconds"]))
    forecast = value["forecast"]
    if not forecast["refused"]:
        shown = interval(forecast["agreement"])
        table.add_row(f"{forecast['rows']:,} (forecast)", "-", shown, "-", "-")
    return table


def removal(value: Row) -> RenderableType:
    verb = "removed" if value["removed"] else "would remove"
    lines = [f"{verb} {folder}" for folder in value["folders"]]
    counted = f"{verb} {len(lines)} folders, {size(value['bytes'])}"
    if value["answers_bytes"]:
        lines.append(f"{verb} the teacher's answers, {size(value['answers_bytes'])}")
    return Text("\n".join([*lines, counted]))


def findings(rows: Sequence[Row]) -> Table:
    table = table_of("", "what", "state", "found", "what to do")
    area = ""
    for row in rows:
        first = row["area"] if row["area"] != area else ""
        area = row["area"]
        state = f"[{STATES[row['state']]}]{row['state']}[/]"
        table.add_row(first, row["name"], state, escape(row["value"]), escape(row["hint"]))
    return table


def table_of(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def line(label: str, text: str) -> Text:
    return Text.assemble((f"{label}: ", "bold"), text)
