"""The report in a real browser, offline: Chromium where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_report import phone_report, sample_report
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


@pytest.fixture(params=[sample_report, phone_report], ids=["measured", "estimated"])
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
    measure = page.with_name("measured.html")
    script = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    text = page.read_text("utf-8").replace("default-src 'none'", "default-src 'unsafe-inline'")
    measure.write_text(text.replace("</body>", script), "utf-8")
    done = browse(measure, f"--window-size={width},800", "--dump-dom")
    found = re.search(r"<title>(\d+)</title>", done.stdout)
    assert found is not None
    assert int(found[1]) <= max(width, 500)  # Chromium's window is never narrower than 500


def test_the_report_can_be_drawn(page: Path) -> None:
    picture = page.with_suffix(".png")
    browse(page, "--window-size=1200,2400", f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000
