"""Results side by side: what is better, what is refused, and which conditions hold."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from matplotlib.figure import Figure
from sample_results import (
    CHECK,
    changed,
    first_answers,
    sample_result,
    without_prompts,
    write,
)

from edgedistill import comparison_text
from edgedistill.bench.agreement import bootstrap
from edgedistill.compare import Compared, compare, read_for_comparison
from edgedistill.differences import ALIKE, BETTER, UNTOLD, WORSE, difference, ratio_of, turns_ratio
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.measures import measure
from edgedistill.report.comparison import fronts, pareto
from edgedistill.report.plots import TEACHER, intervals
from edgedistill.result_file import Result, read_result, write_result
from edgedistill.result_set import Named

Run = Callable[..., Ran]
BASE = sample_result(1)
WORSE_ANSWERS = changed(first_answers(), lost=14, gained=2)  # 3 points of 400

LOOSE = sample_result(2, decode=36, noise=0.1)  # slower as measured, and within the noise


def named(**results: Result) -> list[Named]:
    return [Named(name, Path(f"{name}.json"), result) for name, result in results.items()]


def laid(baseline: bool = True, fail_if: tuple[str, ...] = (), **results: Result) -> Compared:
    held = named(base=BASE, **results)
    return compare(held, held[0] if baseline else None, fail_if)


@pytest.mark.parametrize(("one_sitting", "share"), [(True, 1 / 3), (False, (1 + 1 / 3) / 2)])
def test_welch_by_hand(one_sitting: bool, share: float) -> None:
    ours, base = (measure([[a - 1], [a], [a + 1]], "s") for a in (90.0, 100.0))
    ratio, low, high = ratio_of(ours, base, one_sitting)
    # 3.98 degrees by Welch and Satterthwaite, of which 3 whole ones are counted: Student's t.
    half = 3.182 * math.sqrt(share / 90**2 + share / 100**2)
    assert ratio == pytest.approx(0.9)
    assert (low, high) == pytest.approx((0.9 * math.exp(-half), 0.9 * math.exp(half)))


def test_turns_by_hand() -> None:
    """What moves both from turn to turn is no difference."""
    paces = [100.0 + 7 * (turn % 4) for turn in range(12)]
    base, ours = (measure([[pace * a] for pace in paces], "s") for a in (1.0, 0.95))
    assert turns_ratio(ours, base) == pytest.approx((0.95, 0.95, 0.95))
    shares = [0.95 + 0.001 * turn for turn in range(12)]
    ours = measure([[pace * a] for pace, a in zip(paces, shares, strict=True)], "s")
    found = turns_ratio(ours, base)
    logs = [math.log(share) for share in shares]
    means = sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])
    assert found[1:] == pytest.approx((math.exp(means[13]), math.exp(means[64])))  # T = 13 of 78
    assert found[0] == pytest.approx(math.exp(statistics.median(means)))
    assert math.isnan(turns_ratio(measure([[0.0]] * 12, "s"), base)[0])


def test_a_few_disturbed_turns_do_not_bend_many() -> None:
    base = measure([[100.0 + i % 3] for i in range(20)], "tokens/s")
    rates = [group[0] * 0.95 for group in base.groups]
    ours = measure([[50.0], [60.0], [70.0], *([rate] for rate in rates[3:])], "tokens/s")
    ratio, low, high = turns_ratio(ours, base)
    assert ratio == pytest.approx(0.95, abs=0.001)
    assert 0.8 < low <= ratio <= high < 0.96
    held = named(**{name: replace(BASE, sitting="a", figures={"tg128": each})
                    for name, each in (("base", base), ("ours", ours))})  # fmt: skip
    judged = compare(held, held[0], ["tg128 < 0.97 * baseline", "tg128 < 0.94 * baseline"]).judged
    assert [each.holds for each in judged] == [True, False]
    assert "0.950 of it turn by turn" in judged[0].said


def test_results_of_one_sitting_are_held_against_each_other_turn_by_turn() -> None:
    """A machine that slows down by half on the way tells two files apart that took turns."""
    paces = [40.0, 30.0, 20.0, 35.0, 25.0] * 4
    base, ours = (
        replace(
            BASE,
            sitting="a",
            figures={"tg128": measure([[pace * share] for pace in paces], "tokens/s")},
        )
        for share in (1.0, 0.95)
    )
    turns = difference("tg128", ours, base)
    assert turns is not None
    assert (turns.verdict, turns.value) == (WORSE, pytest.approx(0.95))
    assert turns.in_turn
    few = [replace(each, figures={"tg128": measure(each.figures["tg128"].groups[:3], "tokens/s")})
           for each in (ours, base)]  # fmt: skip
    found = difference("tg128", *few)
    assert found is not None
    ratio, low, high = ratio_of(*(each.figures["tg128"] for each in few), one_sitting=True)
    assert (found.value, found.low, found.high, found.in_turn) == (ratio, low, high, False)
    for other in ("b", None):
        apart = difference("tg128", replace(ours, sitting=other), base)
        assert apart is not None
        assert apart.verdict == ALIKE


@pytest.mark.parametrize(
    ("ours", "figure", "verdict"),
    [
        (sample_result(2), "tg128", ALIKE),
        (sample_result(2, decode=38), "tg128", WORSE),
        (sample_result(2, decode=43), "tg128", BETTER),
        (sample_result(2, decode=38), "inter_token_p95", WORSE),
        (sample_result(2, decode=38, fingerprint="bbbb"), "tg128", UNTOLD),
        (sample_result(2, decode=38, busy=True), "tg128", UNTOLD),
        (sample_result(2, decode=38, processes=1), "tg128", UNTOLD),
        (sample_result(2, size=90_000_000), "bytes", BETTER),
        (sample_result(2), "bytes", ALIKE),
        (sample_result(2, right=WORSE_ANSWERS), "agreement", WORSE),
        (sample_result(2, right=WORSE_ANSWERS, fingerprint="bbbb"), "gold", WORSE),
        (sample_result(2, right=changed(first_answers(), 8, 4)), "agreement", ALIKE),
    ],
)
def test_a_difference_counts_beyond_its_interval(ours: Result, figure: str, verdict: str) -> None:
    found = difference(figure, ours, BASE)
    assert found is not None
    assert found.verdict == verdict
    assert (found.value is None) == (verdict == UNTOLD) == bool(found.why)


def test_the_best_of_each_column() -> None:
    fast = sample_result(2, decode=50, name="fast", right=WORSE_ANSWERS)
    small = sample_result(3, name="small", size=70_000_000, decode=41, right=WORSE_ANSWERS)
    best = {row.name: row.best for row in laid(False, fast=fast, small=small).rows}
    assert {"tg128", "end_to_end_p50", "inter_token_p95"} <= set(best["fast"])
    assert best["small"] == ["bytes"]
    assert best["base"] == ["agreement", "gold"]


def test_a_server_tells_no_size_and_no_machine(tmp_path: Path) -> None:
    far = sample_result(2, name="far")
    told = replace(
        far,
        model={**far.model, "sha256": None, "bytes": None, "file": None},
        device={**far.device, "address": "http://far/v1", "cpu": None, "fingerprint": None},
        load={"before": None, "during": None, "busy": None},
    )
    write_result(told, tmp_path / "far.json")
    found = laid(True, far=read_result(tmp_path / "far.json"))
    row = next(row for row in found.rows if row.name == "far")
    assert row.device == "http://far/v1"
    assert "far: whether other work disturbed its device is not known" in found.notes
    assert "bytes" not in row.against
    assert "bytes" not in row.figures
    assert row.against["tg128"].verdict == UNTOLD
    assert row.against["agreement"].verdict == ALIKE


def test_a_device_that_does_not_tell_its_load_is_judged_and_noted() -> None:
    slow = sample_result(2, decode=20, name="phone")
    unheard = replace(slow, load={**slow.load, "busy": None})
    found = laid(True, ("tg128 < 0.97 * baseline", "tg128 < 30"), phone=unheard)
    assert [judged.holds for judged in found.judged] == [True, True]
    assert "phone: whether other work disturbed its device is not known" in found.notes
    row = next(row for row in found.rows if row.name == "phone")
    assert (row.busy, row.against["tg128"].verdict) == (False, WORSE)


def test_equal_results_have_no_winner() -> None:
    rows = laid(False, other=sample_result(1, name="other")).rows
    assert [row.best for row in rows] == [[], []]


def test_a_busy_result_is_shown_and_never_the_best() -> None:
    busy = sample_result(2, decode=80, size=1000, name="busy", busy=True)
    slow = sample_result(3, decode=30, name="slow")
    found = laid(False, busy=busy, slow=slow)
    best = {row.name: row.best for row in found.rows}
    assert best["busy"] == []
    assert "tg128" in best["base"]  # of those that were measured undisturbed
    assert best["base"].count("bytes") == 0  # the busy one's file is smaller all the same
    assert found.notes == ["busy: no measure of the machine: other work disturbed it"]


def test_each_device_has_its_own_fastest() -> None:
    here, there = sample_result(2, decode=50), sample_result(3, decode=90, fingerprint="bbbb")
    best = {row.name: "tg128" in row.best for row in laid(False, here=here, there=there).rows}
    assert best == {"base": False, "here": True, "there": False}  # alone on its device


def test_what_differs_on_one_device_is_noted() -> None:
    other = replace(sample_result(2), settings={**BASE.settings, "threads": 8})
    elsewhere = replace(sample_result(2, fingerprint="bbbb"), settings={"threads": 4})
    assert laid(other=other, elsewhere=elsewhere).notes == ["threads differs (base: 2, other: 8)"]


def test_a_runtime_that_was_compiled_otherwise_is_noted_by_what_it_lacks() -> None:
    runtime = {**BASE.device["runtime"], "kernels": "AVX2 AVX512 OPENMP"}
    amx = {**runtime, "kernels": "AVX2 AVX512 AMX_INT8 OPENMP"}
    one, two, untold = (
        replace(sample_result(2), device={**BASE.device, "runtime": each})
        for each in (runtime, amx, BASE.device["runtime"])
    )
    assert laid(False, one=one, two=two, untold=untold).notes == [
        "kernels differs (one: without, two: AMX_INT8)"
    ]


def test_other_settings_of_answers_are_noted_on_any_device() -> None:
    asked = {"threads": 8, "max_tokens": 8, "system": "Be brief.\n" * 9}
    there = replace(sample_result(2, fingerprint="bbbb"), settings=asked)
    alone = without_prompts(replace(sample_result(3), settings=asked | {"threads": 2}))
    assert laid(there=there, alone=alone).notes == [
        "max_tokens differs (base: 64, there: 8)",
        f"system message differs (base: None, there: {'Be brief. ' * 6}... (90 characters))",
    ]


def test_a_result_without_prompts_stands_beside_others() -> None:
    row = laid(alone=without_prompts(sample_result(2))).rows[1]
    assert "agreement" not in row.figures
    assert row.against["tg128"].verdict == ALIKE


@pytest.mark.parametrize(
    ("condition", "ours", "holds"),
    [
        ("tg128 < 0.97 * baseline", sample_result(2, decode=38), True),
        ("tg128 < baseline", sample_result(2, decode=38), True),
        ("tg128 < 0.97 * baseline", sample_result(2), False),
        ("tg128 < baseline", sample_result(2), False),
        ("tg128 < 0.9 * baseline", sample_result(2, decode=38), False),
        ("tg128 < 0.97 * baseline", LOOSE, False),
        ("inter_token.p95 > 1.02 * baseline", sample_result(2, decode=38), True),
        ("tg128 < 1.2 * baseline", sample_result(2, decode=44), True),  # asks for 20 % more
        ("tg128 < 1.2 * baseline", sample_result(2, decode=56), False),
        ("tg128 < 1.01 * baseline", sample_result(2), False),  # that noise would be enough for
        ("agreement < baseline - 0.02", sample_result(2, right=WORSE_ANSWERS), True),
        ("agreement < baseline - 0.04", sample_result(2, right=WORSE_ANSWERS), False),
        ("agreement < baseline - 0.02", sample_result(2), False),
        ("agreement < baseline + 0.1", sample_result(2), True),
        ("inter_token.p95 > 0.02", sample_result(2), True),
        ("inter_token.p95 > 0.05", sample_result(2), False),
        ("agreement < 0.899", sample_result(2, right=WORSE_ANSWERS), False),  # within its interval
        ("agreement < 0.95", sample_result(2, right=WORSE_ANSWERS), True),
        ("bytes > baseline", sample_result(2, size=105_000_001), True),
        ("bytes > baseline", sample_result(2), False),
        ("tg128 < baseline", sample_result(2, decode=9, fingerprint="bbbb"), None),
        ("tg128 < baseline", sample_result(2, decode=9, busy=True), None),
        ("tg128 < 10", sample_result(2, decode=9, busy=True), None),
        ("agreement < baseline", sample_result(2, busy=True), False),
        ("tg128 < 10", sample_result(2, decode=9, processes=1), None),
        ("agreement < 0.5", without_prompts(sample_result(2)), None),
    ],
)
def test_when_a_condition_holds(condition: str, ours: Result, holds: bool | None) -> None:
    (judged,) = laid(fail_if=(condition,), ours=ours).judged
    assert judged.holds is holds, judged.said


def test_intervals_can_be_ignored() -> None:
    text = ("tg128 < 0.97 * baseline",)
    for ours in (LOOSE, sample_result(2, decode=38, busy=True)):
        held = named(base=BASE, ours=ours)
        assert not compare(held, held[0], text).judged[0].holds
        assert compare(held, held[0], text, ignore_intervals=True).judged[0].holds is True
    there = named(base=BASE, ours=sample_result(2, decode=9, fingerprint="bbbb"))
    assert compare(there, there[0], text, ignore_intervals=True).judged[0].holds is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (sample_result(2, digest="mix-2"), r"base and other cannot be compared.*digest mix-2"),
        (replace(BASE, check={**CHECK, "kind": "label"}), "checks differ: kind 'exact', and 'la"),
        (replace(BASE, check=None), "their checks differ: kind 'exact', and none"),
    ],
)
def test_what_cannot_be_compared(other: Result, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        laid(other=other)


@pytest.fixture
def files(here: Path) -> Path:
    """base.json, slow.json (decode -5 %, agreement -3 points) and equal.json here."""
    write(BASE, here / "base.json")
    write(sample_result(2, decode=38, right=WORSE_ANSWERS, name="slow"), here / "slow.json")
    write(sample_result(3), here / "equal.json")
    return here


def test_folders_and_files_are_read_once(files: Path) -> None:
    held, base, _ = read_for_comparison([files, files / "slow.json"], files / "base.json")
    assert [each.name for each in held] == ["base", "equal", "slow"]
    assert base is held[0]


def test_equal_names_are_told_apart_by_folder(here: Path) -> None:
    for folder in ("a", "b"):
        (here / folder).mkdir()
        write(BASE, here / folder / "r.json")
    held, *_ = read_for_comparison([Path("a"), Path("b")], None)
    assert [each.name for each in held] == ["a/r", "b/r"]


def test_the_table(run: Run, files: Path) -> None:
    done = run("compare", "base.json", "slow.json", "--baseline", "base.json")
    assert done.code == 0, done.err
    for expected in ("baseline", "decode", "★", " ▼", "-3.0 ▼", "400 prompts"):
        assert expected in done.out, done.out


def test_a_condition_that_holds_ends_with_3_behind_the_table(run: Run, files: Path) -> None:
    words = ["--baseline", "base.json", "--fail-if", "tg128 < 0.97 * baseline"]
    done = run("compare", ".", *words, "--fail-if", "agreement < baseline - 0.02")
    assert done.code == 3
    assert "tg128 < 0.97 * baseline: holds for slow" in done.out
    assert "tg128 < 0.97 * baseline: does not hold for equal" in done.out
    assert done.err == "error: 2 conditions hold\n"
    again = run("compare", ".", *words, "--format", "csv")
    assert "error: tg128 < 0.97 * baseline: slow: " in again.err  # a CSV says nothing of it
    assert run("compare", "equal.json", *words).code == 0


@pytest.mark.parametrize(
    ("values", "unit", "said"),
    [
        ((38.123456, 40.0), "tokens/s", ["38.12 tokens/s", "40 tokens/s"]),
        ((0.0401, 0.05), "s", ["40.1 ms", "50 ms"]),
        ((0.9, 1.1), "s", ["0.9 s", "1.1 s"]),
        ((105_000_001, 105_000_000), "bytes", ["105.000001 MB", "105 MB"]),
        ((0.87, 0.87), "share", ["87 %", "87 %"]),
    ],
)
def test_what_is_held_against_each_other(
    values: tuple[float, float], unit: str, said: list[str]
) -> None:
    assert comparison_text.in_one_unit(values, unit) == said


def test_a_star_is_explained_where_there_is_one(run: Run, files: Path) -> None:
    assert "★ better than" in run("compare", "base.json", "slow.json").out
    assert "★" not in run("compare", "base.json", "equal.json").out
    assert "★" not in run("compare", "base.json", "equal.json", "--format", "markdown").out


def test_a_file_given_twice_is_told(run: Run, files: Path) -> None:
    words = ["compare", "base.json", ".", "--baseline", "base.json"]
    assert "note: base.json is given twice, and stands here once" in run(*words).out
    assert "given twice" not in run("compare", ".", "--baseline", "base.json").out


def test_each_file_is_parsed_once(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "package.json").write_text('{"name": "app"}', "utf-8")
    parse, parsed = json.loads, list[str]()
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(text), parse(text))[1])
    done = run("compare", "slow.json", ".", ".", "--baseline", "base.json", "--format", "csv")
    assert (done.code, len(parsed)) == (0, 4)


def test_a_condition_that_cannot_be_told_fails(run: Run, files: Path) -> None:
    write(sample_result(4, busy=True), files / "busy.json")
    done = run("compare", "busy.json", "--baseline", "base.json", "--fail-if", "tg128 < baseline")
    assert done.code == 1
    assert "cannot be told for busy: other work disturbed the machine" in done.out
    assert done.err == "error: 1 condition cannot be told, see above\n"


def test_formats(run: Run, files: Path) -> None:
    words = ["compare", "base.json", "slow.json", "--baseline", "base.json"]
    table = run(*words, "--format", "markdown").out.splitlines()
    assert len({line.count("|") for line in table[:4]}) == 1
    assert table[1] == "| --- | ---: | ---: |"  # a column for each result
    decoded = next(line for line in table if line.startswith("| decode, tokens/s |"))
    assert "<br><sub>35.6\u00a0to\u00a040.7</sub><br><sub>\u00d70.948\u00a0▼</sub>" in decoded
    rows = list(csv.DictReader(io.StringIO(run(*words, "--format", "csv").out)))
    (decode,) = [row for row in rows if (row["result"], row["figure"]) == ("slow", "tg128")]
    assert decode["verdict"] == "worse"
    assert float(decode["against"]) == pytest.approx(0.95, abs=0.02)
    value = json.loads(run(*words, "--format", "json").out)
    assert value == run(*words, "--json").json
    assert value["rows"][1]["against"]["agreement"]["value"] == pytest.approx(-0.03)


def test_many_results_are_lines_in_markdown(run: Run, here: Path) -> None:
    for number in range(7):
        write(sample_result(number, name=f"m{number}"), here / f"r{number}.json")
    table = run("compare", ".", "--format", "markdown").out.splitlines()
    assert table[0].startswith("| result | decode<br><sub>tokens/s</sub> |")
    assert [line[2:4] for line in table[2:9]] == [f"r{number}" for number in range(7)]


def test_a_page_without_network_and_with_all_charts(run: Run, files: Path) -> None:
    done = run("compare", ".", "--baseline", "base.json", "--html", "page.html", "--format", "csv")
    assert done.code == 0, done.err
    page = (files / "page.html").read_text("utf-8")
    assert page.count("<svg") == 2 * 4  # wide and narrow
    for unwanted in ("http://", "https://", "<script", "src="):
        assert unwanted not in page.replace("http://www.w3.org", "")
    assert page.index(">agreement<") < page.index(">decode<")
    for expected in ("slow", "no other there is both faster", "var(--student)"):
        assert expected in page


def test_a_hollow_marker_is_not_filled_by_its_interval() -> None:
    axes = Figure().subplots()
    share = {"value": 0.8, "low": 0.7, "high": 0.9}
    intervals(axes, [(0, share)], "gold", "s", 0.0, TEACHER, filled=False)
    assert axes.lines[0].get_marker() == "s"
    assert all(axes.lines[0].zorder > bar.zorder for bar in axes.collections)


def test_files_of_others_are_left_out_of_a_folder(run: Run, files: Path) -> None:
    (files / "package.json").write_text('{"name": "app"}', "utf-8")
    assert "package.json: no results, and left out" in run("compare", ".").out
    for words in (["package.json"], [".", "package.json"]):
        done = run("compare", *words)
        assert (done.code, "package.json: it is no result" in done.err) == (1, True)


def test_a_file_that_nests_too_deep(run: Run, files: Path) -> None:
    deep = "[" * 100_000
    (files / "deep.json").write_text(deep, "utf-8")
    assert "deep.json: no results, and left out" in run("compare", ".").out
    (files / "bundle").mkdir()
    (files / "bundle" / "manifest.json").write_text(deep, "utf-8")
    for name, said in (("deep.json", "deep.json: it is"), ("bundle", "manifest.json: this part")):
        done = run("compare", name)
        assert (done.code, said in done.err) == (1, True), done.err


def test_a_model_in_the_place_of_a_result(run: Run, here: Path) -> None:
    (here / "m.gguf").write_bytes(b"GGUF\xff\xfe")
    done = run("compare", "m.gguf")
    assert (done.code, "m.gguf: it is a model, and no result of one" in done.err) == (1, True)


@pytest.mark.parametrize("columns", [60, 80, 120, 500])
def test_a_table_is_whole_at_any_width(
    run: Run, here: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for number in range(4):
        result = sample_result(number, name=f"a-long-name-of-a-model-{number}")
        write(result, here / f"r{number}.json")
    table = run("compare", ".", "--baseline", "r0.json").out
    wanted = run("compare", ".", "--baseline", "r0.json", "--format", "csv").out
    assert max(map(len, table.splitlines())) <= columns
    for label in ("decode", "memory", "agreement", "size"):
        assert label in table
    agreement = [row for row in csv.DictReader(io.StringIO(wanted)) if row["figure"] == "agreement"]
    for row in agreement:
        low, high = (f"{100 * float(row[end]):.3g}" for end in ("low", "high"))
        assert f"{low} to {high}" in table


def test_noise_is_named_where_a_bound_is_crossed_by_it(run: Run, here: Path) -> None:
    write(sample_result(1, decode=100.0, noise=0.1), here / "base.json")
    write(sample_result(2, decode=94.0, noise=0.1), here / "new.json")
    words = ["compare", "new.json", "--baseline", "base.json"]
    done = run(*words, "--fail-if", "tg128 < 0.97 * baseline", "--fail-if", "tg128 < 101")
    assert done.code == 0
    assert "does not tell it from noise" in done.out
    assert "beyond the bound as measured, but its interval reaches" in done.out


def test_what_mcnemar_decides_is_told_by_its_p() -> None:
    """Nine prompts lost and two won: the interval excludes 0, and p is .065."""
    ours = sample_result(2, right=changed(first_answers(), lost=9, gained=2))
    text = ("agreement < baseline", "agreement < baseline + 0.001")
    exact, wider = laid(fail_if=text, ours=ours).judged
    assert exact.holds is False
    assert "McNemar's test with p 0.065 (it counts below 0.05) does not tell it" in exact.said
    assert "interval" not in exact.said
    assert wider.holds is True  # more is asked for than the baseline has, which the interval tells
    better = sample_result(2, right=changed(first_answers(), lost=2, gained=6))
    (judged,) = laid(fail_if=("agreement < baseline + 0.02",), ours=better).judged
    assert "the interval of the difference" in judged.said


def test_a_page_of_many_results(run: Run, here: Path) -> None:
    for number in range(40):
        write(sample_result(number, name=f"m{number}"), here / f"r{number}.json")
    done = run("compare", ".", "--html", "page.html", "--format", "csv")
    assert (done.code, done.err) == (0, "drawn: page.html\n")
    assert "r39" in (here / "page.html").read_text("utf-8")


def test_a_page_of_results_without_prompts(run: Run, here: Path) -> None:
    write(without_prompts(BASE), here / "r.json")
    assert run("compare", "r.json", "--html", "page.html").code == 0
    assert "<svg" not in (here / "page.html").read_text("utf-8")


def cut(text: str) -> str:
    return text[: len(text) // 2]


def edited(**change: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | change)


def of_decode(**change: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        value = json.loads(text)
        value["figures"]["tg128"] |= change
        return json.dumps(value)

    return edit


def of_likeness(**change: Any) -> Callable[[str], str]:
    return lambda text: edited(likeness=json.loads(text)["likeness"] | change)(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "bad.json: it is incomplete, cut off"),
        (edited(version=2), "bad.json: it is of version 2, and this reads 1"),
        (edited(figures={"tg128": 3}), "bad.json: it is damaged"),
        (edited(model={"name": "x"}), "bad.json: it is damaged: model lacks sha256, bytes"),
        (edited(load=[]), "bad.json: it is damaged: load is no object"),
        (edited(settings=None), "bad.json: it is damaged: settings is no object"),
        (edited(check="exact"), "bad.json: it is damaged: check is no object"),
        (edited(figures=None), "bad.json: it is damaged: figures is no object"),
        (of_decode(groups="oops"), "bad.json: it is damaged: tg128 has something that is no num"),
        (of_decode(value=math.nan), "bad.json: it is damaged: tg128 has something that is no num"),
        (of_decode(groups=[]), "bad.json: it is damaged: tg128 has an empty group"),
        (of_likeness(rows=[1]), "bad.json: it is damaged: "),
        (of_likeness(rows=[{"id": "p0", "same": 1}]), "a verdict that is not true or false"),
        (of_likeness(gold={"value": 1}), "bad.json: it is damaged: "),
        (lambda text: "", "bad.json: it is incomplete"),
    ],
)
def test_a_file_that_is_no_result(
    run: Run, files: Path, change: Callable[[str], str], said: str
) -> None:
    text = (files / "base.json").read_text("utf-8")
    (files / "bad.json").write_text(change(text), "utf-8")
    for words in (["bad.json"], ["."]):
        done = run("compare", *words)
        assert (done.code, said in done.err) == (1, True), done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "Missing argument 'RESULT...'"),
        (["none.json"], 1, "none.json: it cannot be read: No such file"),
        (["empty"], 1, "this folder has no result (*.json)"),
        (["bundle"], 1, "this is no bundle"),
        (["base.json", "--baseline", "empty"], 2, "takes one result file or bundle"),
        (["base.json", "--html", "no/page.html"], 2, "there is no folder no; make it first"),
        (["base.json", "--fail-if", "tg128 < baseline"], 2, "needs --baseline FILE"),
        (["base.json", "--fail-if", "tg128 < x"], 2, "at character 9"),
        (["base.json", "--baseline", "base.json"], 2, "nothing to hold against the baseline but"),
        (["base.json", "--format", "xml"], 2, "'xml' is not one of"),
    ],
)
def test_bad_words(run: Run, files: Path, words: list[str], code: int, said: str) -> None:
    (files / "empty").mkdir()
    (files / "bundle").mkdir()
    (files / "bundle" / "manifest.json").write_text("{}", "utf-8")
    done = run("compare", *words)
    assert (done.code, said in done.err) == (code, True), done.err


@pytest.mark.parametrize("style", ["csv", "markdown", "table"])
def test_one_format_at_a_time(run: Run, files: Path, style: str) -> None:
    done = run("compare", "base.json", "--json", "--format", style)
    assert (done.code, done.json["error"]["what"]) == (2, "--format is for output without --json")
    assert run("compare", "base.json", "--json", "--format", "json").code == 0


def test_a_row_that_no_answer_compares(here: Path) -> None:
    other = sample_result(2, right=[True] * 300)
    (found,) = [row.against["agreement"] for row in laid(other=other).rows[1:]]
    assert (found.verdict, found.why[:20]) == (UNTOLD, "not the same prompts")


def test_a_bare_baseline_needs_one() -> None:
    with pytest.raises(UsageError, match="needs --baseline"):
        laid(False, fail_if=("tg128 < baseline",))


def test_other_files_of_ours_in_a_folder_are_left_out(run: Run, here: Path) -> None:
    (here / "all").mkdir()
    write(BASE, here / "all" / "base.json")
    (here / "all" / "judged.json").write_text('{"kind": "edgedistill-judgement"}', "utf-8")
    assert [row["name"] for row in run("compare", "all", "--json").json["rows"]] == ["base"]


def test_a_planted_regression_is_found_and_equal_builds_are_left_alone(
    run: Run, here: Path
) -> None:
    """5 % of decode and 3 points of agreement; benchmarks/planted_regression.py has the rates."""
    conditions = ["tg128 < 0.97 * baseline", "agreement < baseline - 0.02"]
    words = ["--baseline", "base.json", *(w for text in conditions for w in ("--fail-if", text))]
    write(BASE, here / "base.json")
    write(sample_result(50, decode=38, right=WORSE_ANSWERS), here / "worse.json")
    done = run("compare", "worse.json", *words, "--json")
    assert done.code == 3
    assert [each["holds"] for each in done.json["judged"]] == [True, True]
    for attempt in range(20):
        right = changed(first_answers(), lost=4, gained=4, seed=attempt)  # noise of answers, too
        write(sample_result(100 + attempt, right=right), here / "equal.json")
        assert run("compare", "equal.json", *words, "--format", "csv").code == 0


def test_the_front_holds_what_no_other_beats() -> None:
    def at(seconds: float, agreement: float) -> dict[str, Any]:
        figures = {"end_to_end_p50": seconds, "agreement": agreement}
        return {"figures": {name: {"value": value} for name, value in figures.items()}}

    fast, middle, right = at(1, 0.7), at(2, 0.8), at(4, 0.9)
    beaten = [at(3, 0.75), at(2, 0.79), at(4, 0.8)]
    assert pareto([right, *beaten, middle, fast]) == [fast, middle, right]


def test_each_device_has_a_front_of_its_own() -> None:
    """Two far servers tell no fingerprint, and a machine elsewhere may be of the same kind."""
    held = {}
    for number, (address, known) in enumerate(
        [("http://a/v1", False), ("http://b/v1", False), ("local", True), ("ssh://c", True)]
    ):
        made = sample_result(number, decode=40 + number)
        device = {**made.device, "address": address}
        held[f"r{number}"] = replace(
            made, device=device if known else {**device, "cpu": None, "fingerprint": None}
        )
    held["again"] = replace(held["r2"], load={**held["r2"].load, "busy": True})
    rows = compare(named(**held)).to_json()["rows"]
    assert [[row["name"] for row in best] for best in fronts(rows)] == [
        ["r0"], ["r1"], ["r2"], ["r3"],
    ]  # fmt: skip


def drifting(share: float, refused: int = 0) -> Result:
    """So many of its answers drift, and so many of 20 prompts that the teacher refuses are
    answered."""
    made = sample_result(1)
    assert made.likeness is not None
    rows = [
        {**row, "drifts": i < 400 * share, "refuses": False}
        for i, row in enumerate(made.likeness["rows"])
    ]
    likeness = {
        **made.likeness,
        "rows": rows,
        "drift": vars(bootstrap([row["drifts"] for row in rows], 500, 0)),
        "refusals": vars(bootstrap([False] * 400, 500, 0)),
        "refused": [
            {"id": f"r{i}", "answers": i < refused, "refuses": i >= refused} for i in range(20)
        ],  # `refuses` as files of before say it
        "regressions": vars(bootstrap([i < refused for i in range(20)], 500, 0)),
    }
    return replace(made, likeness=likeness)


def test_less_drift_is_better() -> None:
    more, less = drifting(0.1), drifting(0.05)
    found = difference("drift", more, less)
    assert found is not None
    assert (found.verdict, found.value) == (WORSE, pytest.approx(0.05))
    back = difference("drift", less, more)
    assert back is not None
    assert back.verdict == BETTER


def test_answers_to_what_is_refused_are_compared_prompt_by_prompt() -> None:
    found = difference("regressions", drifting(0, refused=12), drifting(0))
    assert found is not None
    assert (found.verdict, found.value) == (WORSE, pytest.approx(0.6))


def test_refusing_what_the_teacher_refuses_is_no_over_refusal() -> None:
    careful, careless = drifting(0), drifting(0, refused=20)
    for one, other in ((careful, careless), (careless, careful)):
        found = difference("refusals", one, other)
        assert found is not None
        assert (found.verdict, found.value) == (ALIKE, 0)


def test_more_drift_fails_a_ci() -> None:
    held = named(base=drifting(0.05), new=drifting(0.1))
    (judged,) = compare(held, held[0], ["drift > baseline + 0.02"]).judged
    assert judged.holds


def test_a_fault_that_no_result_has_takes_no_column() -> None:
    shown = comparison_text.columns(compare(named(base=drifting(0.05))).to_json())
    assert "drift" in shown
    assert "refusals" not in shown
    assert "tg128" in shown


def test_an_older_result_beside_a_newer(tmp_path: Path) -> None:
    old = read_result(write(sample_result(2), tmp_path / "old.json"))
    assert difference("drift", drifting(0.1), old) is None


def test_a_flag_that_is_none_is_refused(tmp_path: Path) -> None:
    file = write(drifting(0.1), tmp_path / "r.json")
    file.write_text(file.read_text("utf-8").replace('"drifts": true', '"drifts": 1', 1), "utf-8")
    with pytest.raises(ArtifactError, match="a verdict that is not true or false"):
        read_result(file)
