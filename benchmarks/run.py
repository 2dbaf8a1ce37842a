"""All benchmarks: our hot paths, and the side-by-side scripts whose inputs are at hand.

    python benchmarks/run.py --against REF           this checkout beside another, in turn
    python benchmarks/run.py --baseline FOLDER|FILE  against an earlier run on this machine
    python benchmarks/run.py --list

Hot paths run in --processes processes of their own, since two processes differ by more than two
rounds of one. Slower beyond noise and by --least-effect at least: exit code 3 (see judging.py).
With --against both are measured in this run, who goes first alternating, so that a machine that
changes over minutes favours neither: the way to trust. All is kept as JSON in --out, after each
process, so that Ctrl-C loses one at most.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from dataclasses import asdict
from pathlib import Path

from hot_path_runs import ROOT, Side, checked_out, find, measure_once
from judging import ALIKE, LEAST_EFFECT, SLOWER, UNTOLD, Judged, judge
from run_files import Run, find_baseline
from side_by_side import SCRIPTS, Inputs, Script, at_hand, read_inputs, run_script, skipped

from edgedistill import __version__, machine
from edgedistill.artifacts import require_writable
from edgedistill.commit import commit_of
from edgedistill.errors import EdgedistillError
from edgedistill.load_watch import BUSY_SHARE, LoadWatch
from edgedistill.report.units import duration

INTERRUPTED = 130


def main() -> int:
    given = _arguments()
    try:
        if given.list:
            print(_listed())
            return 0
        return _run(given)
    except EdgedistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    option = parser.add_argument
    option("--out", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    option("--only", action="append", default=[], metavar="NAME", help="hot paths whose name "
           "contains it, or the script of that name; repeatable")  # fmt: skip
    option("--list", action="store_true", help="name all, and end")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--against", metavar="REF", help="a commit, branch or tag")
    beside.add_argument("--baseline", type=Path, metavar="FOLDER|FILE", help="an earlier run")
    option("--processes", type=_at_least_two, default=5)
    option("--seconds", type=float, default=0.5, help="of each hot path in each process, at most")
    option("--least-effect", type=float, default=LEAST_EFFECT, help="a share of the time")
    option("--judge-busy", action="store_true", help="judge although other work disturbed it")
    option("--hot-paths-only", action="store_true", help="no scripts")
    option("--input", action="append", default=[], metavar="NAME=VALUE",
           help="of a script; of a name several for those that take more")  # fmt: skip
    option("--workspace", type=Path, default=Path(".edgedistill"))
    return parser.parse_args()


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is below 2: of one process no noise is known")
    return number


def _listed() -> str:
    lines = ["hot paths:", *(f"  {name}" for name in find(())), "scripts:"]
    for script in SCRIPTS:
        needs = f" ({', '.join(script.needs)})" if script.needs else ""
        lines.append(f"  {script.name}{needs}{', takes hours' if script.slow else ''}")
    return "\n".join(lines)


def _run(given: argparse.Namespace) -> int:
    inputs = read_inputs(given.input)
    before = None
    if given.baseline is not None:
        before = find_baseline(given.baseline, machine.fingerprint())
        _tell(f"baseline: {before[0]}")
    require_writable(given.out)
    run = _fresh(given)
    file = given.out / f"{run.made.replace(':', '')}.json"
    try:
        hot = _hot_paths(given, run, file)
        if hot and (before is not None or given.against is not None):
            earlier = run.against_benchmarks if before is None else before[1].benchmarks
            busy = bool((run.load or {}).get("busy"))
            busy |= before is not None and bool((before[1].load or {}).get("busy"))
            found = judge(run.benchmarks, earlier, given.least_effect, one_run=before is None)
            _judge(given, run, found, busy)
        if not given.hot_paths_only:
            _scripts(given, inputs | {k: v for k, v in at_hand(given.workspace).items()
                                      if k not in inputs}, run, file)  # fmt: skip
    except KeyboardInterrupt:
        run.write(file)
        _tell(f"interrupted: what was measured until now is in {file}")
        return INTERRUPTED
    run.complete = True
    run.write(file)
    _tell(f"written: {file}")
    return _code(run)


def _fresh(given: argparse.Namespace) -> Run:
    at = commit_of(ROOT)
    return Run(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        edgedistill=__version__,
        machine=machine.facts(),
        commit=None if at is None else asdict(at),
        settings={"processes": given.processes, "seconds": given.seconds, "only": given.only,
                  "least_effect": given.least_effect, "judge_busy": given.judge_busy},
    )  # fmt: skip


def _hot_paths(given: argparse.Namespace, run: Run, file: Path) -> bool:
    """Measure them into `run`; False where only scripts were asked for."""
    scripts = {script.name for script in SCRIPTS}
    only = [name for name in given.only if name not in scripts]
    if given.only and not only:
        return False
    tests = list(find(only).values())
    with contextlib.ExitStack() as held:
        sides = [Side("this checkout", ROOT)]
        if given.against is not None:
            tree, commit = held.enter_context(checked_out(given.against))
            sides.append(Side(given.against, tree))
            run.against = {"ref": given.against, "commit": commit}
        _tell("listening to other work on this machine")
        watch = LoadWatch()
        for number in range(given.processes):
            for side in sides if number % 2 == 0 else sides[::-1]:
                _tell(f"process {number + 1} of {given.processes}: {side.name}")
                measure_once(side, tests, given.seconds)
            run.benchmarks = sides[0].figures()
            run.against_benchmarks = sides[-1].figures() if len(sides) > 1 else {}
            run.write(file)
        load = watch.stop()
    run.load = {**asdict(load), "busy": load.busy}
    if load.busy:
        share = max(load.before or 0.0, load.during or 0.0)
        run.notes.append(
            f"other work took {share:.0%} of the processor time (more than {BUSY_SHARE:.0%})"
        )
    _tell("\n".join(f"{name:32} {duration(each.value)}" for name, each in run.benchmarks.items()))
    return True


def _judge(given: argparse.Namespace, run: Run, found: list[Judged], busy: bool) -> None:
    if busy and not given.judge_busy:
        why = "other work disturbed the machine"
        found = [Judged(j.name, UNTOLD, j.ratio, j.low, j.high, j.p_value, why) for j in found]
    run.judged = [asdict(each) for each in found]
    _tell("\nseconds now over seconds before, with the 95 % interval of each alone:")
    for each in found:
        numbers = ""
        if each.ratio is not None:
            numbers = f"{each.ratio:.3f} ({each.low:.3f} to {each.high:.3f}) "
        said = "" if each.verdict == ALIKE else f"{each.verdict}{each.why and f': {each.why}'}"
        _tell(f"{each.name:32} {numbers}{said}")


def _scripts(given: argparse.Namespace, inputs: Inputs, run: Run, file: Path) -> None:
    named = [script for script in SCRIPTS if script.name in given.only]
    for script in named if given.only else SCRIPTS:
        why = skipped(script, inputs, script in named)
        run.scripts.append(_done(script, inputs, why))
        run.write(file)


def _done(script: Script, inputs: Inputs, why: str | None) -> dict[str, object]:
    if why is not None:
        _tell(f"skipped {script.name}: {why}")
        return {"name": script.name, "skipped": why}
    _tell(f"run {script.name}")
    found = run_script(script, inputs)
    if "failed" in found:
        _tell(f"FAILED {script.name}: {found['failed']}")
    return found


def _code(run: Run) -> int:
    """3: something became slower; 1: a script failed, or it cannot be told."""
    verdicts = {each["verdict"] for each in run.judged}
    slower = [each["name"] for each in run.judged if each["verdict"] == SLOWER]
    if slower:
        _tell(f"error: slower beyond noise: {', '.join(slower)}")
        return 3
    for note in run.notes:
        _tell(f"note: {note}")
    failed = [each["name"] for each in run.scripts if "failed" in each]
    if UNTOLD in verdicts:
        _tell("error: what cannot be told was not judged")
    return 1 if failed or UNTOLD in verdicts else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
