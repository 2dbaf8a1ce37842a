"""The pages of `compare` and `history` in a real browser, offline: Chromium where installed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from sample_bundle import DATASET, write_bundle
from sample_report import fitted_report, phone_report, sample_report
from sample_results import changed, first_answers, sample_result, without_prompts
from test_report_page import BROWSER, browse, title_by

from edgedistill.bundle_result import bundle_facts, read_bundle
from edgedistill.compare import compare, distributions
from edgedistill.history import History, Point, Series
from edgedistill.report.comparison import comparison_page, history_page
from edgedistill.result_file import Result
from edgedistill.result_set import Named

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
]
LONG = "SmolLM2-135M-Instruct-support-sql-v1.0-Q4_K_M-fitted-to-a-phone"
# Texts of a chart, in both of its widths, that lie on another or beyond its edge.
SPOILT = """
document.head.insertAdjacentHTML('beforeend', '<style>.on-wide, .on-narrow {display: block'
  + ' !important} .on-narrow {width: 340px}</style>');
const spoilt = [];
for (const chart of document.querySelectorAll('svg')) {
  const edge = chart.getBoundingClientRect();
  const upright = [...chart.querySelectorAll('text')].filter((text) => text.textContent.trim()
    && !/rotate[(]-?[1-9]/.test(text.getAttribute('transform') || ''));
  const boxes = upright.map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([name, a], i) => {
    if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1
        || a.bottom > edge.bottom + 1) spoilt.push('cut: ' + name);
    boxes.forEach(([other, b], j) => {
      if (i < j && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3
          && b.top < a.bottom - 3) spoilt.push(name + ' on ' + other);
    });
  });
}
document.title = document.querySelectorAll('svg').length + ' charts: ' + spoilt.join('; ');
"""


def server(result: Result) -> Result:
    figures = {k: v for k, v in result.figures.items() if k.startswith(("end", "time"))}
    return replace(
        result,
        model={**result.model, "sha256": None, "bytes": None},
        device={**result.device, "address": "https://api.example.com/v1", "cpu": None,
                "fingerprint": None},
        load={"before": None, "during": None, "busy": None},
        figures=figures,
    )  # fmt: skip


def many(count: int) -> list[Named]:
    """Of twelve one has a long name, one is busy, one has no prompts and one is a server."""
    held = []
    for number in range(count):
        made = sample_result(
            number, decode=20 + 4 * number, size=60_000_000 + 25_000_000 * number,
            right=changed(first_answers(), number, 2), name=f"model-{number}", busy=number == 3,
        )  # fmt: skip
        made = {4: without_prompts, 5: server}.get(number, lambda result: result)(made)
        name = LONG if number == 1 else f"{LONG}-{number}" if number == 2 else f"r{number}"
        held.append(Named(name, Path(f"{name}.json"), made))
    return held


def bundles(folder: Path) -> list[Named]:
    """Three, and a sitting of the first one's file."""
    reports = {"laptop": sample_report, "phone": phone_report, "laptop-fitted": fitted_report}
    paths = [write_bundle(folder / f"support-sql-{k}", made()) for k, made in reports.items()]
    held = [Named(path.name, path, read_bundle(path)) for path in paths]
    mix = {"source": "held-out prompts", "digest": "x", "prompts": 134, "dataset": DATASET}
    made = sample_result(9, right=first_answers(134), fingerprint="2f6d0c51a9e4")
    bundle = bundle_facts(paths[0], {"spec": {"recipe": {"name": "r"}, "target": {"name": "t"}},
                                     "key": "k", "provenance": {"bench": {"inputs": {
                                         "dataset": DATASET}}}})  # fmt: skip
    made = replace(made, token_mix=mix, model={**made.model, "bundle": bundle})
    return [*held, Named("measured", Path("measured.json"), made)]


def course(by_commit: bool) -> History:
    """Thirty sittings of two models, some of them busy."""
    commits = [f"{number:02x}c0ffee{number % 7}" for number in range(30)]
    series = [
        Series(name, "AMD EPYC 9B14 96-Core Processor", "f", "", [
            Point(f"2026-03-{n + 1:02d}T10:00:00+00:00", "sha", value + n % 5, value - 3, None,
                  n % 9 == 4, commits[n])
            for n in range(30)
        ])
        for name, value in ((LONG, 40.0), ("small", 90.0))
    ]  # fmt: skip
    return History("tg128", "tokens/s", series, 0, "s", commits if by_commit else None)


def compared(named: list[Named], *histories: History) -> str:
    value = compare(named, named[0]).to_json()
    return comparison_page(value, distributions(named), [each.to_json() for each in histories])


@pytest.fixture(params=["one", "three", "twelve", "bundles", "time", "commits"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = {
        "one": lambda: compared(many(1)),
        "three": lambda: compared(many(3)),
        "twelve": lambda: compared(many(12)),
        "bundles": lambda: compared(bundles(tmp_path), course(True), course(False)),
        "time": lambda: history_page(course(False).to_json()),
        "commits": lambda: history_page(course(True).to_json()),
    }
    file = tmp_path / "page.html"
    file.write_text(made[request.param](), "utf-8")
    return file


def test_the_page_opens_without_a_complaint(page: Path) -> None:
    done = browse(page, "--dump-dom")
    assert "</html>" in done.stdout
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    assert "ERR_" not in done.stderr  # nothing was asked of the network


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    found = title_by(page, "document.title = document.documentElement.scrollWidth", width)
    assert int(found) <= max(width, 500)  # Chromium's window is never narrower than 500


def test_no_text_of_a_chart_is_cut_or_lies_on_another(page: Path) -> None:
    assert re.fullmatch(r"\d+ charts: ", title_by(page, SPOILT, 1200))
