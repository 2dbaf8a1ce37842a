"""The files in which a Linux system tells about itself: read here, or printed by a shell elsewhere.

Either way they are a mapping from a file's path to its text, so that one parser serves both. What a
system lacks, or does not let us read, is not in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

MARK = "edgedistill-file "
Files = Mapping[str, str]


def read_files(patterns: Sequence[str], root: Path = Path("/")) -> Files:
    """Those of this machine; `patterns` are absolute, with * in them, and below `root`."""
    found = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern.lstrip("/"))):
            try:
                found[f"/{path.relative_to(root).as_posix()}"] = path.read_text("utf-8", "replace")
            except OSError:  # sensors that are there and tell nothing
                continue
    return found


def script_of(patterns: Sequence[str], commands: Sequence[str] = ()) -> str:
    """A POSIX shell script that prints the same files, and under its own words what each of
    `commands` prints, where it is there."""
    lines = [
        f"for f in {' '.join(patterns)}; do",
        f'  if [ -f "$f" ] && [ -r "$f" ]; then printf \'\\n%s%s\\n\' "{MARK}" "$f"; '
        'cat "$f" 2>/dev/null; fi',
        "done",
    ]
    for command in commands:
        name = shlex.quote(command)
        lines += [
            f"if command -v {command.split()[0]} >/dev/null 2>&1; then",
            f"  printf '\\n%s%s\\n' '{MARK}' {name}; {command} 2>/dev/null </dev/null; fi",
        ]
    return "\n".join([*lines, "true"])


def parse_files(printed: str) -> Files:
    """What the script printed, as a mapping."""
    found = {}
    for part in printed.split(f"\n{MARK}")[1:]:
        name, _, text = part.partition("\n")
        found[name] = text
    return found


def number(files: Files, name: str) -> int | None:
    """The number that a file holds; None where it holds none."""
    try:
        return int(files[name])
    except (KeyError, ValueError):
        return None


def fields(text: str, separator: str = ":") -> dict[str, str]:
    """`name: value` lines; of a name that comes again, the first."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, separated, value = line.partition(separator)
        if separated:
            found.setdefault(key.strip().lower(), value.strip())
    return found
