"""A headless Chromium with a profile of its own that ends with us."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import psutil

BROWSER_VARIABLE = "EDGEDISTILL_BROWSER"
NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
    "microsoft-edge",
)  # fmt: skip
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
LAST_LINES = 8
# The page is ours and asks no other host: nothing of the browser's own may, either.
SWITCHES = (
    "--headless=new", "--no-first-run", "--no-default-browser-check", "--disable-gpu",
    "--disable-extensions", "--disable-sync", "--disable-background-networking",
    "--disable-component-update", "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
    "--disable-dev-shm-usage", "--no-proxy-server", "--mute-audio", "--hide-scrollbars",
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def find_browser() -> str | None:
    """A browser of the Chromium family: $EDGEDISTILL_BROWSER, else on PATH or where it installs."""
    given = os.environ.get(BROWSER_VARIABLE)
    if given is not None:
        return shutil.which(given)
    named = next(filter(None, map(shutil.which, NAMES)), None)
    return named or next((place for place in PLACES if Path(place).is_file()), None)


class Chromium:
    """One page in one process tree; a context manager."""

    def __init__(self, browser: str, url: str, switches: tuple[str, ...] = ()) -> None:
        self._profile = tempfile.TemporaryDirectory(
            prefix="edgedistill-browser-", ignore_cleanup_errors=True
        )
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        root = sys.platform != "win32" and os.geteuid() == 0
        # Chromium refuses its sandbox to root, as in a container.
        more = ("--no-sandbox",) if root else ()
        try:
            self._process = subprocess.Popen(
                [
                    browser,
                    *SWITCHES,
                    *more,
                    *switches,
                    f"--user-data-dir={self._profile.name}",
                    url,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._printed,
            )
        except OSError:
            self._printed.close()
            self._profile.cleanup()
            raise

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """What it printed last."""
        self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, self._printed.tell() - 8192))
        text = self._printed.read().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def memory_bytes(self) -> int | None:
        """Resident bytes of its largest process now: the one with the page. None once it ended."""
        sizes = []
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                sizes.append(int(process.memory_info().rss))
        return max(sizes, default=None)

    def _tree(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.Error:
            return []

    def close(self) -> None:
        """End the whole tree and remove the profile. Safe to call twice."""
        tree = self._tree()
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(tree, timeout=10)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._printed.close()
        self._profile.cleanup()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
