"""The report in a real browser, offline: Chromium where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_report import fitted_report, phone_report, sample_report
from test_report import render

from edgedistill.results import BenchResult

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
]


def browse(page: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", *words, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


SAMPLES = {"measured": sample_report, "estimated": phone_report, "fitted": fitted_report}
# How many parts of the fidelity chain lie on one another.
OVERLAPS = """
const parts = [...document.querySelectorAll('.chain .model, .chain .box')].map(
  (part) => part.getBoundingClientRect());
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
  && a.top < b.bottom - 1 && b.top < a.bottom - 1;
document.title = parts.filter((a, i) => parts.some((b, j) => i !== j && meet(a, b))).length
  + ' of ' + parts.length;
"""


def title_by(page: Path, script: str, width: int) -> str:
    """What a script makes of the page's title in a window of that width."""
    scripted = page.with_name("scripted.html")
    text = page.read_text("utf-8").replace("default-src 'none'", "default-src 'unsafe-inline'")
    scripted.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    done = browse(scripted, f"--window-size={width},800", "--dump-dom")
    found = re.search(r"<title>(.*)</title>", done.stdout)
    assert found is not None
    return found[1]


@pytest.fixture(params=list(SAMPLES.values()), ids=list(SAMPLES))
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    result: BenchResult = request.param()
    file = tmp_path / "report.html"
    file.write_text(render(result), "utf-8")
    return file


def test_the_report_opens_without_a_complaint(page: Path) -> None:
    done = browse(page, "--dump-dom")
    assert "</html>" in done.stdout
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    assert "ERR_" not in done.stderr  # nothing was asked of the network


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    found = title_by(page, "document.title = document.documentElement.scrollWidth", width)
    assert int(found) <= max(width, 500)  # Chromium's window is never narrower than 500


@pytest.mark.parametrize("width", [1200, 900, 400])
def test_no_part_of_the_chain_lies_on_another(page: Path, width: int) -> None:
    assert re.fullmatch(r"0 of [789]|0 of 1\d", title_by(page, OVERLAPS, width))


def test_the_report_can_be_drawn(page: Path) -> None:
    picture = page.with_suffix(".png")
    browse(page, "--window-size=1200,2400", f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000
