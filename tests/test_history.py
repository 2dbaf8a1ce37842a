"""The store of all sittings, and a figure over time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Ran
from sample_results import CHECK, sample_result, without_prompts, write

from edgedistill.artifacts import digest_of
from edgedistill.errors import UsageError
from edgedistill.history import STORE, TICKS, read_history, remember, sparkline
from edgedistill.result_file import Result

Run = Callable[..., Ran]


def values(workspace: Path, figure: str = "tg128") -> list[list[float]]:
    found = read_history(workspace, figure)
    return [[round(point.value) for point in series.points] for series in found.series]


@pytest.fixture
def store(here: Path) -> Path:
    """Three sittings of one model, one on another device, one of another model."""
    folder = here / ".edgedistill"
    for seed, decode in ((1, 40), (3, 60), (2, 50)):
        remember(sample_result(seed, decode=decode, noise=0), folder)
    remember(sample_result(4, decode=90, fingerprint="bbbb", noise=0, busy=True), folder)
    remember(without_prompts(sample_result(5, decode=10, name="other", noise=0)), folder)
    return folder


def test_series_by_model_and_device_in_order_of_time(store: Path) -> None:
    assert values(store) == [[40, 50, 60], [90], [10]]
    assert [series.points[0].busy for series in read_history(store).series] == [False, True, False]


def test_two_servers_are_two_series(here: Path) -> None:
    for address in ("http://one/v1", "http://two/v1"):
        made = sample_result(1, decode=40, noise=0)
        device = {**made.device, "address": address, "cpu": None, "fingerprint": None}
        remember(replace(made, device=device), here / "w")
    found = read_history(here / "w").series
    assert [series.device for series in found] == ["http://one/v1", "http://two/v1"]


def test_what_a_sitting_lacks_is_left_out(store: Path) -> None:
    assert len(read_history(store, "agreement").series) == 2


def test_other_prompts_are_another_series(store: Path) -> None:
    remember(sample_result(6, digest="mix-2"), store)
    assert [series.mix for series in read_history(store, "end_to_end.p50").series] == [
        "mix-1", "mix-1", "mix-2",
    ]  # fmt: skip
    assert len(read_history(store, "tg128").series) == 3


SAMPLE = sample_result(6, decode=70, noise=0)


def asked_as(system: str | None) -> str:
    named = ("asked", "prompt", "prompt_version", "temperature")
    return digest_of({**dict.fromkeys(named), "system": system})[:6]


@pytest.mark.parametrize(
    ("figure", "other", "apart"),
    [
        ("tg128", replace(SAMPLE, settings={**SAMPLE.settings, "threads": 1}),
         ["2 threads", "1 thread"]),
        ("tg128", replace(SAMPLE, check={"kind": "json"}), [""]),
        ("tg128", replace(SAMPLE, settings={**SAMPLE.settings, "max_tokens": 8}), [""]),
        ("agreement", replace(SAMPLE, settings={**SAMPLE.settings, "threads": 1}), [""]),
        ("agreement", replace(SAMPLE, check={"kind": "json"}),
         [f"check {each['kind']} {digest_of(each)[:6]}" for each in (CHECK, {"kind": "json"})]),
        ("end_to_end.p50", replace(SAMPLE, settings={**SAMPLE.settings, "max_tokens": 8}),
         ["max_tokens 64", "max_tokens 8"]),
        ("agreement", replace(SAMPLE, settings={**SAMPLE.settings, "system": "Be brief."}),
         [f"asked as {asked_as(system)}" for system in (None, "Be brief.")]),
        ("tg128", replace(SAMPLE, settings={**SAMPLE.settings, "system": "Be brief."}), [""]),
        ("pp512", replace(SAMPLE, device={**SAMPLE.device, "runtime": {"name": "wllama"}}),
         ["llama.cpp", "wllama"]),
        ("bytes", replace(SAMPLE, device={**SAMPLE.device, "runtime": {"name": "wllama"}}),
         [""]),
    ],
)  # fmt: skip
def test_other_settings_are_another_series(
    store: Path, figure: str, other: Result, apart: list[str]
) -> None:
    remember(other, store)
    found = [(each.device, each.model, each.apart) for each in read_history(store, figure).series]
    assert [words for *of, words in found if of == ["cpu aaaa", "student"]] == apart


def test_lines_of_an_earlier_version_are_one_series(store: Path) -> None:
    file = store / STORE
    later = ("settings", "runtime", "check")
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    older = [{k: v for k, v in line.items() if k not in later} for line in lines]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in older), "utf-8")
    assert values(store) == [[40, 50, 60], [90], [10]]
    remember(SAMPLE, store)
    assert values(store) == [[40, 50, 60], [90], [10], [70]]
    assert [series.threads for series in read_history(store).series] == [None, None, None, 2]


def test_what_tells_series_apart_is_shown(run: Run, store: Path) -> None:
    assert "threads" not in run("history").out
    remember(replace(SAMPLE, settings={**SAMPLE.settings, "threads": 1}), store)
    shown = run("history", "--html", "h.html").out
    assert "2 threads" in shown
    assert "1 thread " in shown
    page = (store.parent / "h.html").read_text("utf-8")
    assert "student, cpu aaaa, 1 thread<" in page


@pytest.mark.parametrize(
    "torn",
    [
        '{"made": "2026-03',
        '["list"]',
        "{}",
        '{"made": 3}',
        "\x00\x00",
        pytest.param("[" * 99999, id="deep"),
    ],
)
def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(store: Path, torn: str) -> None:
    with (store / STORE).open("a", encoding="utf-8") as stream:
        stream.write(torn)
    assert (read_history(store).torn, values(store)[2]) == (1, [10])
    remember(sample_result(6, decode=70, noise=0), store)
    assert (read_history(store).torn, values(store)[0]) == (1, [40, 50, 60, 70])


def test_bytes_that_are_no_text(store: Path) -> None:
    with (store / STORE).open("ab") as stream:
        stream.write(b"\xff\xfe{")
    assert read_history(store).torn == 1


def test_the_command(run: Run, store: Path) -> None:
    done = run("history", "--html", "h.html")
    assert done.code == 0, done.err
    assert TICKS[0] in done.out
    assert "3" in done.out
    page = (store.parent / "h.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert "decode over time" in page
    assert run("history", "agreement", "--json").json["unit"] == "share"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tg12"], "'tg12' is no figure\n  did you mean tg128?"),
        (["drift"], "no sitting here knows drift\n  known: tg128, pp512, time_to_first"),
        (["--workspace", "elsewhere"], "no sitting is remembered here"),
        (["--html", "no/h.html"], "there is no folder no"),
    ],
)
def test_bad_words(run: Run, store: Path, words: list[str], said: str) -> None:
    done = run("history", *words)
    assert (done.code, said in done.err) == (2, True), done.err


def test_no_figure_of_this_name(store: Path) -> None:
    with pytest.raises(UsageError, match="is no figure"):
        read_history(store, "speed")


def test_sparkline() -> None:
    assert sparkline([1, 2, 3]) == f"{TICKS[0]}{TICKS[4]}{TICKS[-1]}"
    assert sparkline([5, 5]) == TICKS[4] * 2


def committed(store: Path, *commits: dict[str, object] | None) -> None:
    """Give the sittings of the store these commits, in the order they were remembered."""
    lines = [json.loads(line) for line in (store / STORE).read_text("utf-8").splitlines()]
    told = [{**line, "commit": each} for line, each in zip(lines, commits, strict=False)]
    text = "".join(f"{json.dumps(line)}\n" for line in told)
    (store / STORE).write_text(text, "utf-8")


def commit(letter: str, day: int | None = None, dirty: bool | None = False) -> dict[str, object]:
    at = None if day is None else f"2026-01-{day:02d}T10:00:00+02:00"
    return {"hash": letter * 40, "dirty": dirty, "committed": at}


def test_by_commit_in_the_order_of_the_commits(store: Path) -> None:
    committed(store, commit("c", 3), commit("a", 1), commit("c", 3, True), None, commit("b", 2))
    found = read_history(store, by_commit=True)
    assert found.commits == ["a" * 9, "b" * 9, "c" * 9, "c" * 9 + "+"]
    assert found.outside == 1
    assert [len(series.points) for series in found.series] == [3, 1]


def test_without_the_commits_dates_by_the_first_sitting(store: Path) -> None:
    committed(store, commit("b", None, None), commit("a", None, None))
    assert read_history(store, by_commit=True).commits == ["b" * 9, "a" * 9]


def test_the_table_by_commit(run: Run, store: Path) -> None:
    """The last sitting of the first model was at the oldest commit."""
    committed(store, commit("b", 2), commit("a", 1), commit("c", 3), None, None)
    shown = run("history", "--by", "commit").out
    _, amounts, commits = (line.split() for line in shown.splitlines()[2:5])
    rates = (round(float(before)) for before, unit in pairwise(amounts) if "tokens" in unit)
    assert list(rates) == [60, 50]
    assert commits == ["a" * 9, "c" * 9]
    assert "2026-03-04" in shown  # the last sitting
    assert "2 sittings without a commit were left out" in shown


def test_no_sitting_with_a_commit(run: Run, store: Path) -> None:
    committed(store, None, None)
    done = run("history", "--by", "commit")
    assert (done.code, "knows its commit" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    "broken",
    [{"check": {"kind": "exact"}}, {"check": "exact"}, {"settings": [2]}, {"runtime": "x"}],
)
def test_a_line_whose_settings_are_none(store: Path, broken: dict[str, object]) -> None:
    file = store / STORE
    first, *others = file.read_text("utf-8").splitlines()
    lines = [json.dumps(json.loads(first) | broken), *others]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert read_history(store).torn == 1


@pytest.mark.parametrize("broken", [{"hash": 3}, "abc", {**commit("a"), "committed": "soon"}])
def test_a_line_whose_commit_is_none(store: Path, broken: object) -> None:
    committed(store, commit("a", 1), broken)  # type: ignore[arg-type]
    assert read_history(store).torn == 1


def test_the_workspaces_commit_is_remembered(here: Path) -> None:
    (here / ".git").mkdir()
    (here / ".git" / "HEAD").write_text("a" * 40)
    remember(sample_result(1), here / ".edgedistill")
    (point,) = read_history(here / ".edgedistill").series[0].points
    assert point.commit.startswith("a" * 9)


def test_a_page_by_commit(run: Run, store: Path) -> None:
    committed(store, *(commit(letter, day) for day, letter in enumerate("abcde", 1)))
    done = run("history", "--by", "commit", "--html", "h.html")
    assert done.code == 0, done.err
    page = (store.parent / "h.html").read_text("utf-8")
    assert "decode over commits" in page
    assert page.count("aaaaaaaaa") == 3  # an axis in each width, and the table


def test_compare_draws_the_course_of_its_models(run: Run, store: Path) -> None:
    write(sample_result(1), store.parent / "r.json")
    words = ["compare", "r.json", "--format", "csv", "--html", "c.html"]
    assert run(*words, "--workspace", ".edgedistill").code == 0
    page = (store.parent / "c.html").read_text("utf-8")
    assert 'id="history-tg128-660' in page
    assert 'id="history-agreement-660' in page
    assert "other, cpu" not in page  # a model that is not compared
    done = run("compare", "r.json", "--workspace", ".edgedistill")
    assert (done.code, "--workspace is for --html" in done.err) == (2, True)
    done = run(*words, "--workspace", "elsewhere")
    assert (done.code, "no sitting is remembered" in done.err) == (2, True)
