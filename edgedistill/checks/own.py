"""A check that the user wrote, in a process of its own: it may throw, hang or die on one answer,
and that is counted against that answer and shown, not the end of a build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.child import Child, Program
from edgedistill.errors import DatasetError, RuntimeFailure

PYTHON = Program(runtime="the check", module="edgedistill.check_child", packages={}, extra="")
START_SECONDS = 60.0


class PythonChecker:
    """`same` and `invalid` of a Python file. `thrown`: what it threw, by the answer it threw on.

    Raises (when it is made):
        DatasetError: the file cannot be imported, or has no `same`.
    """

    def __init__(self, file: Path, timeout_seconds: float) -> None:
        self._file, self._timeout_seconds = file, timeout_seconds
        self._child: Child | None = None
        self.thrown: dict[str, str] = {}
        about = self._started().ask("load", file=str(file))
        if "threw" in about:
            self.close()
            raise DatasetError(
                f"the check cannot be used: {about['threw']}",
                where=str(file),
                hint="it is a Python file with a function `same(answer, teacher) -> bool`",
            )
        told = about["ok"] or f"the function same of {file.name} says so"
        self.description = f"{told.strip()} (a check of your own, {file.name})."

    def invalid(self, answer: str) -> str | None:
        found, threw = self._call("invalid", answer, answer)
        return threw if threw is not None else found

    def same(self, answer: str, teacher: str) -> bool:
        found, threw = self._call("same", answer, answer, teacher)
        return threw is None and bool(found)

    def close(self) -> None:
        """End its process. Safe to call twice."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def _call(self, name: str, about: str, *texts: str) -> tuple[Any, str | None]:
        """What the function gave, or what it threw on the answer `about`."""
        try:
            if self._child is None:
                self._started().ask("load", file=str(self._file))
            assert self._child is not None
            given = self._child.ask("call", name=name, texts=texts)
        except RuntimeFailure as error:
            self.close()  # it hangs, or is gone: the next answer has a new one
            given = {"threw": error.what.splitlines()[0]}
        threw = given.get("threw")
        if threw is not None:
            self.thrown[about] = threw
        return given.get("ok"), threw

    def _started(self) -> Child:
        self._child = Child(PYTHON, self._file, self._timeout_seconds)
        return self._child
