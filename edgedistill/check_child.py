"""A user's check in a process of its own, started by checks/own.py: `load` a file, `call` one of
its functions. What the file throws is an answer, too: {"threw": text}.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from edgedistill.answering import answer_requests

OWN = "edgedistill_check"


def _load(file: str) -> tuple[ModuleType, Any]:
    spec = importlib.util.spec_from_file_location(OWN, Path(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "same", None)):
        raise AttributeError("it has no function `same`")
    return module, (module.same.__doc__ or "").strip().split("\n\n")[0]


def _invalid(module: ModuleType, answer: str) -> Any:
    own = getattr(module, "invalid", None)
    if own is None:
        return None if answer.strip() else "empty"
    found = own(answer)
    return None if found is None else str(found)


def main() -> None:
    loaded: list[ModuleType] = []

    def answer(do: str, given: dict[str, Any]) -> Any:
        try:
            if do == "load":
                module, about = _load(given["file"])
                loaded[:] = [module]
                return {"ok": about}
            if given["name"] == "invalid":
                return {"ok": _invalid(loaded[0], *given["texts"])}
            return {"ok": bool(loaded[0].same(*given["texts"]))}
        except Exception as error:
            return {"threw": f"{type(error).__name__}: {error}"}

    answer_requests(answer)


if __name__ == "__main__":
    main()
