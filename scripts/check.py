"""Every check there is: CI, the README and developers call this one.

python scripts/check.py             all of them, then a summary; exit 1 when any failed
python scripts/check.py -- -k cli   the words after -- go to pytest
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = ("edgedistill", "scripts", "benchmarks")


def main(arguments: list[str]) -> int:
    typed = [name for name in TYPED if any((ROOT / name).glob("**/*.py"))]
    checks = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", "--strict", *typed],
        "pytest": ["pytest", *arguments],
    }
    results = [run(name, command) for name, command in checks.items()]
    print()
    for name, passed, seconds in results:
        print(f"{'passed' if passed else 'FAILED'}  {name} ({seconds:.0f} s)")
    return 0 if all(passed for _, passed, _ in results) else 1


def run(name: str, command: list[str]) -> tuple[str, bool, float]:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
    return name, done.returncode == 0, time.monotonic() - started


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words[1:] if words[:1] == ["--"] else words))
