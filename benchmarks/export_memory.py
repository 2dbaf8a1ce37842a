"""Our export beside llama.cpp's own converter: peak memory, wall time, and the tensors' bits.

    python benchmarks/export_memory.py STUDENT_FOLDER CONVERT_HF_TO_GGUF.py [--scratch DIR]
        [--quantize LLAMA_QUANTIZE --format Q4_K_M]

STUDENT_FOLDER is a finished `student-*` folder of a workspace: a Hugging Face checkpoint in fp32
with `tokenizer.gguf.json`. Both programs write f16 from it, each as a child process, one behind
the other; the page cache is warmed first. Prints JSON. `peak_resident_bytes` is the kernel's own
maximum (it counts pages of mapped files); `peak_anonymous_bytes` (Linux) leaves those out. Our
figure holds what the stage does besides: hashing the result and flushing it to the disk.

With LLAMA_QUANTIZE, llama.cpp's program, the f16 file is quantized by both, too. Ours runs in a
child process: the peak is the sum of both processes' peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from edgedistill import machine

OURS = """
import sys
from pathlib import Path
from edgedistill.artifacts import Checkpoint, Student
from edgedistill.export import export
from edgedistill.progress import Silent

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
student = Student(folder, "benchmark", "benchmark", "unknown", "benchmark")
print(export(Checkpoint(folder, "benchmark"), student, "benchmark", out, Silent()).model)
"""
OURS_QUANTIZED = """
import resource, sys
from pathlib import Path
from edgedistill.runtime import quantize_file

source, made, format = sys.argv[1:]
quantize_file(Path(source), Path(made), format)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
SAMPLE_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("converter", type=Path)
    parser.add_argument("--quantize", type=Path, help="llama.cpp's llama-quantize")
    parser.add_argument("--format", default="Q4_K_M")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to write to")
    given = parser.parse_args()
    folder = given.folder.resolve()
    read = sum(_read(path) for path in folder.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        out, theirs_file = Path(scratch) / "ours", Path(scratch) / "theirs.gguf"
        ours = _measured([sys.executable, "-c", OURS, str(folder), str(out)])
        options = ["--outtype", "f16", "--outfile", str(theirs_file)]
        theirs = _measured([sys.executable, str(given.converter.resolve()), str(folder), *options])
        made = next(out.rglob("*.gguf"), None)
        pair = (made, theirs_file) if made is not None and theirs_file.is_file() else None
        tensors = _compared(*pair) if pair else None
        size = made.stat().st_size if made is not None else None
        quantized = _quantized(given, made) if given.quantize and made is not None else None
    result = {
        "checkpoint_bytes": read,
        "exported_bytes": size,
        "edgedistill": ours,
        "convert_hf_to_gguf": theirs,
        "tensors": tensors,
        "quantize": quantized,
        "machine": machine.facts(),
    }
    print(json.dumps(result, indent=2))


def _quantized(given: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The same f16 file by our stage's function and by llama.cpp's program."""
    ours_file, theirs_file = source.with_suffix(".ours"), source.with_suffix(".theirs")
    _read(source)
    words = [sys.executable, "-c", OURS_QUANTIZED, str(source), str(ours_file), given.format]
    ours = _measured(words)
    scale = 1 if sys.platform == "darwin" else 1024
    ours["peak_resident_bytes"] += int(ours["printed"]) * scale
    program = str(given.quantize.resolve())
    threads = str(machine.threads())
    theirs = _measured([program, str(source), str(theirs_file), given.format, threads])
    same = _compared(ours_file, theirs_file)
    return {"format": given.format, "edgedistill": ours, "llama_quantize": theirs, "tensors": same}


def _read(path: Path) -> int:
    """Bytes of a file, all of which are read once."""
    with path.open("rb") as stream:
        while stream.read(1 << 24):
            pass
    return path.stat().st_size


def _measured(command: list[str]) -> dict[str, Any]:
    """Exit code, wall seconds and peak memory of one child process."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        anonymous = [0]
        watcher = threading.Thread(target=_watch, args=(child.pid, anonymous), daemon=True)
        watcher.start()
        # wait4 and not wait: it gives this child's own maximum.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        watcher.join()
        printed.seek(0)
        lines = printed.read().decode("utf-8", "replace").splitlines()
    code = child.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "exit_code": code,
        "wall_seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_resident_bytes": usage.ru_maxrss * scale,
        "peak_anonymous_bytes": anonymous[0] or None,
        "printed": lines[-1] if lines else "",
        "last_lines": lines[-6:] if code else [],
    }


def _watch(pid: int, peak: list[int]) -> None:
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            text = status.read_text("ascii", "replace")
        except OSError:
            return  # it ended, or this is not Linux
        found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
        if not found:
            return  # ended and not yet waited for
        peak[0] = max(peak[0], int(found[0]) * 1024)
        time.sleep(SAMPLE_SECONDS)


def _compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """Tensor by tensor: type and bytes."""
    import numpy as np
    from gguf import GGUFReader

    left = {t.name: t for t in GGUFReader(ours).tensors}
    right = {t.name: t for t in GGUFReader(theirs).tensors}
    both = sorted(left.keys() & right.keys())
    differ = [
        name
        for name in both
        if left[name].tensor_type != right[name].tensor_type
        or not np.array_equal(left[name].data.view(np.uint8), right[name].data.view(np.uint8))
    ]
    return {
        "compared": len(both),
        "bit_identical": len(both) - len(differ),
        "different": differ,
        "only_in_ours": sorted(left.keys() - right.keys()),
        "only_in_theirs": sorted(right.keys() - left.keys()),
    }


if __name__ == "__main__":
    main()
