"""How long `edgedistill --help` takes, and whether it loads what it must not.

    python benchmarks/cli_start.py [--runs 10]

Prints JSON: seconds of each run of a fresh process, their median, and the heavy packages found
loaded afterwards (there must be none).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from edgedistill import machine

HEAVY = ("torch", "transformers", "peft", "llama_cpp", "matplotlib", "openai", "numpy")
LOADED = """
import json, sys
from edgedistill.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(json.dumps([name for name in {heavy!r} if name in sys.modules]), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    seconds = [_timed() for _ in range(runs + 1)][1:]  # the first fills the file cache
    result = {
        "command": "edgedistill --help",
        "median_seconds": statistics.median(seconds),
        "max_seconds": max(seconds),
        "seconds": seconds,
        "heavy_packages_loaded": _loaded(),
        "machine": machine.facts(),
    }
    print(json.dumps(result, indent=2))


def _timed() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "edgedistill", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def _loaded() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(heavy=HEAVY)],
        check=True,
        capture_output=True,
        text=True,
    )
    return list(json.loads(done.stderr.splitlines()[-1]))


if __name__ == "__main__":
    main()
