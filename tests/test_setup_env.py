"""What scripts/setup_env.py takes for another environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "setup_env.py"


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_other_flags_for_llama_cpp_are_another_environment(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    plain, found = setup_env.fingerprint(), []
    for flags in ("", " ", "-DGGML_CUDA=on", "-DGGML_CUDA=off"):
        monkeypatch.setenv("CMAKE_ARGS", flags)
        found.append(setup_env.fingerprint())
    assert found[:2] == [plain, plain]
    assert len({plain, *found}) == 3
