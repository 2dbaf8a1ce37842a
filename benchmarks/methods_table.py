"""The methods of docs/methods.md side by side on one recipe: agreement, gold accuracy, calls, time.

    python benchmarks/methods_table.py RECIPE [--proxy WEIGHTS] [--seeds 0,1,2]
        [--methods base,sft,logits,proxy,unaligned,further,on-policy,rejection,white-box]
        [--further PROMPTS]
        [--workspace .edgedistill] [--keep RUNS] > result.json

"further" is proxy that answers PROMPTS, too, which the teacher is never asked.
RECIPE needs `teacher.sampling.top_logprobs` (for logits) and a local teacher (for white-box). Each
adapter is merged in fp32 and answers the held-out prompts in torch; "gold" is a prompt's
`reference` by the recipe's check, the teacher's own share of it beside. All seeds learn from one
proxy. Trainings are stages of the workspace, so a run that was stopped goes on; RUNS is a file of
lines that keeps what was measured. Intervals are bootstrap's over prompts; each method is compared
with sft of the same seed, prompt by prompt (McNemar), and all seeds together (bootstrap over
prompts). Prints JSON and, on stderr, a Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import machine, pipeline
from edgedistill.artifacts import Checkpoint, load_finished
from edgedistill.bench.agreement import bootstrap
from edgedistill.checks import Checker, make_checker
from edgedistill.fidelity import EvalRow, read_rows
from edgedistill.learning import learn_recipe
from edgedistill.merge import merge
from edgedistill.methods import ProxySpec
from edgedistill.paired import compare
from edgedistill.progress import Passing, Silent, Task
from edgedistill.prompting import StudentPrompt
from edgedistill.recipe import LocalTeacher, Recipe, load_recipe

PROXY = "qwen2.5-coder-0.5b-instruct-q4_k_m"
METHODS = ("base", "sft", "logits", "proxy", "unaligned", "on-policy", "rejection", "white-box")
FURTHER = "further"
# Stages whose time counts.
PAID = ("proxy", "proxy-round", "proxy-answers", "targets", "distill", "refine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--proxy", default=PROXY)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--workspace", type=Path, default=Path(".edgedistill"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--further", type=Path)
    given = parser.parse_args()
    recipe, methods = load_recipe(given.recipe), given.methods.split(",")
    if why := refused(recipe, methods, given.further):
        parser.error(why)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    runs = [
        kept(variant(recipe, method, seed, given), method, seed, given)
        for method in methods
        for seed in (seeds if method != "base" else seeds[:1])
    ]
    value = {"machine": machine.facts(), "given": vars(given), "runs": runs}
    print(json.dumps({**value, "against_sft": _against_sft(runs)}, indent=2, default=str))
    sys.stderr.write(_table(runs))


def refused(recipe: Recipe, methods: Sequence[str], further: Path | None) -> str:
    """What a method lacks, known before the others are measured for hours; "" where nothing."""
    unknown = [method for method in methods if method not in (*METHODS, FURTHER)]
    if unknown:
        return f"--methods: {unknown[0]!r} is none of {', '.join((*METHODS, FURTHER))}"
    if FURTHER in methods and further is None:
        return "--methods: further needs --further PROMPTS"
    if "logits" in methods and not recipe.teacher.sampling.top_logprobs:
        return "--methods: logits needs a recipe with teacher.sampling.top_logprobs"
    if "white-box" in methods and not isinstance(recipe.teacher, LocalTeacher):
        return "--methods: white-box needs a recipe with a local teacher"
    return ""


def variant(recipe: Recipe, method: str, seed: int, given: argparse.Namespace) -> Recipe:
    """The recipe with a method of METHODS, or FURTHER."""
    changes: dict[str, Any] = {"seed": seed, "method": "sft"}
    aligned = ProxySpec(weights=given.proxy, min_agreement=0, lora=recipe.distill.lora)
    off = {"warm_up_epochs": 0, "rounds": 0}
    if method == "logits":
        changes["method"] = "logits"
    elif method in ("proxy", "unaligned"):
        own = aligned if method == "proxy" else aligned.model_copy(update=off)
        changes |= {"method": "proxy", "proxy": own}
    elif method == FURTHER:
        own = aligned.model_copy(update={"prompts": given.further.resolve()})
        changes |= {"method": "proxy", "proxy": own}
    elif method == "white-box":
        assert isinstance(recipe.teacher, LocalTeacher)
        white = {"weights": recipe.teacher.weights, "prompt": "teacher", **off}
        changes |= {"method": "proxy", "proxy": aligned.model_copy(update=white)}
    elif method in ("on-policy", "rejection"):
        learn = "dpo" if method == "on-policy" else "rejection"
        rounds = recipe.distill.on_policy.model_copy(update={"learn": learn})
        changes |= {"method": "on-policy", "on_policy": rounds}
    spec = recipe.distill.model_copy(update=changes)
    return recipe.model_copy(update={"distill": spec})


class Stages(Passing):
    """Remembers the folders of all stages, and tells where the work is."""

    def __init__(self) -> None:
        super().__init__(Silent())
        self.folders: list[Path] = []

    def stage(self, name: str, folder: Path, *, reused: bool) -> None:
        self.folders.append(folder)
        sys.stderr.write(f"{name}{' (there)' if reused else ''}\n")

    def task(self, label: str, total: float | None, unit: str = "") -> Task:
        sys.stderr.write(f"  {label}\n")
        return super().task(label, total, unit)

    def note(self, text: str) -> None:
        sys.stderr.write(f"  {text}\n")


def kept(recipe: Recipe, method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """The run as the file given.keep has it; else measured now, and appended."""
    shaped = recipe.model_dump(mode="json")
    key = hashlib.sha256(json.dumps([method, shaped], default=str).encode()).hexdigest()
    lines = given.keep.read_text("utf-8").splitlines() if given.keep and given.keep.exists() else []
    for line in lines:
        if (run := json.loads(line))["key"] == key:
            return dict(run)
    run = {"key": key, **measured(recipe, method, seed, given)}
    if given.keep:
        with given.keep.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(run, default=str) + "\n")
    return run


def measured(recipe: Recipe, method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One training and its held-out answers; `base` is the student as it is."""
    sys.stderr.write(f"== {method}, seed {seed}\n")
    log, out = Stages(), given.workspace
    ready = pipeline.prepared(recipe, out, log)
    assert ready is not None
    rows, checker = read_rows(ready.dataset.folder / "held_out.jsonl"), make_checker(recipe.check)
    checkpoint = Checkpoint(ready.student.folder, ready.student.digest)
    if method != "base":
        adapter = learn_recipe(recipe, ready.traces, ready.dataset, ready.student, out, log)
        checkpoint = merge(adapter, ready.student, out, log)
    said = answers(checkpoint.folder, recipe, rows)
    same = [checker.same(answer, row.answer) for answer, row in zip(said, rows, strict=True)]
    manifests = [done.manifest for f in log.folders if (done := load_finished(f, reused=True))]
    paid = [one for one in manifests if one["stage"] in PAID]
    return {
        "method": method,
        "seed": seed,
        "agreement": asdict(bootstrap(same, 2000, 0)),
        "agreement_unseen": _unseen(same, rows),
        "gold": _gold(said, rows, checker),
        "teacher_gold": _gold([row.answer for row in rows], rows, checker),
        "training_seconds": sum(one["wall_seconds"] for one in paid),
        "teacher_calls": sum(
            one["facts"].get("calls", 0) + one["facts"].get("teacher_calls", 0) for one in manifests
        ),
        "same": same,
        "facts": [{"stage": one["stage"], **one["facts"]} for one in paid],
    }


def answers(folder: Path, recipe: Recipe, rows: Sequence[EvalRow]) -> list[str]:
    """The greedy answers of a checkpoint folder."""
    from edgedistill.torch_runtime import TorchModel

    shown = StudentPrompt(folder, recipe.student)
    asked = [shown.prompt_ids(row.prompt, row.history) for row in rows]
    made = TorchModel(folder).generate(asked, recipe.student.max_tokens, shown.stop_ids)
    return [shown.decode(ids).strip() for ids in made]


def _gold(said: Sequence[str], rows: Sequence[EvalRow], checker: Checker) -> Any:
    right = [
        checker.same(answer, row.reference)
        for answer, row in zip(said, rows, strict=True)
        if row.reference is not None
    ]
    return asdict(bootstrap(right, 2000, 0)) if right else None


def _unseen(same: Sequence[bool], rows: Sequence[EvalRow]) -> Any:
    """Of prompts with a wording that no prompt the teacher answered for training has."""
    unseen = [flag for flag, row in zip(same, rows, strict=True) if not row.seen]
    return asdict(bootstrap(unseen, 2000, 0)) if unseen else None


def _against_sft(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    sft = {run["seed"]: run["same"] for run in runs if run["method"] == "sft"}
    own = [r for r in runs if r["method"] not in ("sft", "base") and r["seed"] in sft]
    each: list[dict[str, Any]] = [
        {"method": run["method"], "seed": run["seed"]}
        | asdict(compare(sft[run["seed"]], run["same"]))
        for run in own
    ]
    return each + [
        {"method": method, "seeds": [r["seed"] for r in own if r["method"] == method]}
        | _over_seeds([(sft[r["seed"]], r["same"]) for r in own if r["method"] == method])
        for method in dict.fromkeys(run["method"] for run in own)
    ]


def _over_seeds(pairs: Sequence[tuple[list[bool], list[bool]]]) -> dict[str, float]:
    """Mean difference over seeds; its interval is of prompts, each with all its seeds."""
    before, after = (np.array([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    gains = (after - before).mean(0)
    drawn = np.random.default_rng(0).choice(gains, (2000, len(gains))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"difference": float(gains.mean()), "low": float(low), "high": float(high)}


def _table(runs: Sequence[dict[str, Any]]) -> str:
    heads = (
        "method",
        "agreement",
        "unseen wordings",
        "gold",
        "share of the teacher's gold",
        "calls",
    )
    lines = [f"| {' | '.join(heads)} | minutes |", "|---|---|---|---|---|---|---|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        shown = ", ".join(
            f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]"
            for a in (run["agreement"] for run in own)
        )
        # What an earlier version kept has no such figure.
        unseen = [run.get("agreement_unseen") for run in own]
        apart = ", ".join(f"{found['value']:.3f}" if found else "-" for found in unseen)
        gold = [run["gold"]["value"] for run in own if run["gold"]]
        whole = [run["teacher_gold"]["value"] for run in own if run["teacher_gold"]]
        golds = ", ".join(f"{value:.3f}" for value in gold) or "-"
        share = f"{statistics.fmean(gold) / statistics.fmean(whole):.1%}" if any(whole) else "-"
        calls = max(run["teacher_calls"] for run in own)
        minutes = statistics.fmean(run["training_seconds"] for run in own) / 60
        cells = (method, shown, apart, golds, share, str(calls), f"{minutes:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
