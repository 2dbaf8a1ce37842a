"""How many bytes two trainings differ by, for each format that a model may ship in.

    python benchmarks/update_sizes.py OLD-F16.gguf NEW-F16.gguf [--formats Q4_0 Q4_K_M ...]
        [--files OLD.gguf NEW.gguf] [--scratch DIR]

OLD and NEW are unquantized exports (a finished export-* folder) of two trainings of one student.
Both are quantized to each format, and the difference between the two is what `edgedistill update`
would send. `--files` adds a pair of files as they are, for example fitted ones. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.artifacts import digest_of_file
from edgedistill.errors import EdgedistillError
from edgedistill.patch import segments, write_patch
from edgedistill.runtime import quantize_file

FORMATS = ("Q4_0", "IQ4_NL", "Q4_K_M", "Q6_K", "Q8_0", "F16")


def main() -> None:
    given = _arguments()
    rows = []
    try:
        with tempfile.TemporaryDirectory(dir=given.scratch) as name:
            for kind in given.formats:
                print(kind, file=sys.stderr)
                old, new = given.old, given.new
                if kind != "F16":
                    old, new = (_quantized(file, kind, Path(name)) for file in (old, new))
                rows.append({"format": kind, **_difference(old, new, Path(name))})
            if given.files:
                old, new = given.files
                rows.append({"format": "as given", **_difference(old, new, Path(name))})
    except EdgedistillError as error:
        raise SystemExit(str(error)) from error
    of = {name: digest_of_file(file) for name, file in (("old", given.old), ("new", given.new))}
    print(json.dumps({"of": of, "rows": rows, "machine": machine.facts()}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--files", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--scratch", type=Path)
    return parser.parse_args()


def _quantized(file: Path, kind: str, scratch: Path) -> Path:
    made = scratch / f"{digest_of_file(file)[:8]}-{kind}.gguf"
    quantize_file(file, made, kind, machine.threads())
    return made


def _difference(old: Path, new: Path, scratch: Path) -> dict[str, Any]:
    with (scratch / "difference").open("wb") as stream:
        write_patch(old, new, segments(old, new), stream)
    return {
        "model_bytes": new.stat().st_size,
        "update_bytes": (scratch / "difference").stat().st_size,
    }


if __name__ == "__main__":
    main()
