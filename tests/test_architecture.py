"""Who may import whom, what stays light, and how large a file may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgedistill"
# From the bottom up; a module may import the layers below its own, and its own but for stages.
LAYERS: tuple[tuple[str, set[str]], ...] = (
    ("facts", {"allocations", "artifacts", "check_specs", "commit",
            "endpoint_fields", "errors", "families",
            "field_help", "figures",
            "hard_texts", "kept_file", "library", "measures", "memory", "methods", "names",
            "number_formats", "onnx_families", "onnx_formats", "onnx_nodes", "printable",
            "progress",
            "recipe", "result_file",
            "results",
            "strict", "target", "termination", "tuning_results", "yamlfile"}),
    ("parts", {"activations", "adapter_file", "ahead", "alignment", "answering", "browser",
            "assertions", "bundle_result", "ceilings", "ceilings_child", "check_child", "checks",
            "child", "comparison_text", "conditions", "judging", "refusing",
            "converter", "converter_child", "devices", "differences", "emulator", "fail_if",
            "history",
            "fidelity", "footprint", "forecast", "ggml", "gguf_header", "gguf_student",
            "gguf_tokenizer", "handover",
            "hf_config", "hf_student", "hf_tokenizer", "hyperparameters", "importance", "layers",
            "linux_files", "load_watch", "machine", "model_prompt",
            "onnx_builder", "onnx_builder_child", "onnx_child", "onnx_runtime", "onnx_tokenizer",
            "onnx_weights",
            "asking", "crew", "own_environment", "paired", "patch", "places", "prompting",
            "quantize_request", "quantized_values", "rates", "report", "result_set", "runtime",
            "runner", "runtime_child", "runtimes", "sandbox", "sandbox_child", "server_prompt",
            "sizes", "spelling", "splitting",
            "streaming", "student", "student_file", "targets", "teacher", "teacher_targets",
            "tensors", "tokenmix", "torch_runtime", "training", "vocabulary", "weights",
            "workspace"}),
    ("stages", {"bench", "collect", "combine", "curate", "distill", "export", "fit", "merge",
            "pack", "prune", "quantize", "trim", "verify"}),
    ("flow", {"adapt", "compare", "evaluate", "feasible", "judge", "learning", "learning_curve",
            "likeness", "pipeline", "planning", "prompts",
            "reached", "recorder", "retention", "scaled", "server_sitting", "settings_apart",
            "sitting", "slices",
            "sweep", "tuning", "update", "variants", "verdicts"}),
    ("command", {"catalogue", "console", "doctor", "evaluation_tables", "initialise",
            "likeness_table", "needs", "result_tables", "tables", "validate"}),
    ("cli", {"__main__", "cli", "cli_bench", "cli_compare", "cli_evaluate", "cli_judge",
            "cli_machine",
            "cli_options",
            "cli_tuning", "cli_update"}),
)  # fmt: skip
LEVEL = {name: level for level, (_, names) in enumerate(LAYERS) for name in names}
STAGES = LAYERS[2][1]
HEAVY = ("torch", "transformers", "peft", "llama_cpp", "openai", "matplotlib", "accelerate")
LATER = (*HEAVY, "pydantic", "yaml", "rich", "psutil", "numpy", "jinja2")
# Foreign package -> the only units that may import it.
BOUNDARIES = {
    "click": {
        "cli",
        "cli_bench",
        "cli_compare",
        "cli_evaluate",
        "cli_judge",
        "cli_machine",
        "cli_options",
        "cli_tuning",
        "cli_update",
    },
    "rich": {
        "cli",
        "cli_bench",
        "cli_tuning",
        "cli_update",
        "console",
        "evaluation_tables",
        "likeness_table",
        "result_tables",
        "tables",
    },
    "llama_cpp": {"runtime_child", "teacher"},
    "openai": {"teacher"},
    "lm_eval": {"evaluate"},
    "datasets": {"evaluate"},
    "huggingface_hub": {"weights"},
    "matplotlib": {"report"},
    "yaml": {"yamlfile"},
    "onnxruntime_genai": {"onnx_child"},
    "onnx": {"export", "onnx_builder_child", "onnx_child", "onnx_weights"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
# Roots of this or that machine; /data/local/tmp is Android's own.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:work|home|root|Users|tmp)/")


def unit(path: Path) -> str:
    """The module or package right below edgedistill/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names a file imports, those for type checking left out."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> set[str]:
    """Units of edgedistill that a file imports."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "edgedistill" and name[1] != "__version__"}


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    me = unit(path)
    for other in own(path) - {me}:
        assert LEVEL[other] <= LEVEL[me], f"{me} imports {other}, which is above it"
        assert not {me, other} <= STAGES, f"stage {me} imports stage {other}"


def test_foreign_packages_stay_behind_their_boundary() -> None:
    for path in FILES:
        used = {name.split(".")[0] for name in imports(path)}
        for package in used & set(BOUNDARIES):
            assert unit(path) in BOUNDARIES[package], f"{path.name} imports {package}"


@pytest.mark.parametrize(("module", "unwanted"), [("cli", LATER), ("pipeline", HEAVY)])
def test_import_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, edgedistill.{module}; print(*(set({unwanted!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without the signature and the docstring, which explain."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_size(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = body_lines(node)
            assert length <= 40, f"{path.name}: {node.name} has {length} lines"


def test_only_the_cli_prints() -> None:
    for path in FILES:
        if unit(path) in ("cli", "runtime_child"):  # a child's stdout is its channel
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (called and node.func.id == "print"), f"{path.name}:{node.lineno} prints"


def test_no_machine_paths() -> None:
    kinds = {".py", ".yaml", ".toml", ".md", ".txt", ".cmake", ".css", ".jinja", ""}
    folders = ("edgedistill", "scripts", "benchmarks", "recipes", "targets", "cmake", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    for path in files:
        if path.suffix in kinds:
            found = MACHINE_PATH.search(path.read_text("utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"
