"""Recipes, targets and their YAML: every problem with file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TARGET

from edgedistill.check_specs import PythonCheck
from edgedistill.errors import ConfigError, Problem
from edgedistill.recipe import load_recipe
from edgedistill.target import load_target
from edgedistill.yamlfile import dotted, load


def problems(path: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, "recipe.yaml")
    return list(caught.value.problems)


def changed(tiny: Path, old: str, new: str) -> Path:
    text = tiny.read_text("utf-8")
    assert old in text
    tiny.write_text(text.replace(old, new), "utf-8")
    return tiny


def test_paths_become_absolute(tiny: Path) -> None:
    recipe = load_recipe(tiny)
    assert recipe.prompts == tiny.parent.resolve() / "prompts.jsonl"
    assert load_recipe(tiny.parent) == recipe  # the folder names the same recipe


@pytest.mark.parametrize(
    ("weights", "place"),
    [
        ("./my-model", "my-model"),
        ("../x", "../x"),
        ("models/mine", "models/mine"),  # is there, so it is no model of a hub
        ("x/student.gguf", "x/student.gguf"),
        ("some/model", None),
        (f"some/model@{'0' * 40}", None),
        ("models", None),
    ],
)
def test_a_student_beside_the_recipe(tiny: Path, weights: str, place: str | None) -> None:
    (tiny.parent / "models" / "mine").mkdir(parents=True)
    changed(tiny, "weights: smollm2-135m-instruct-q4_1", f"weights: {weights}")
    wanted = weights if place is None else str((tiny.parent / place).resolve())
    assert load_recipe(tiny).student.weights == wanted


def test_a_check_of_ones_own_lies_beside_the_recipe(tiny: Path) -> None:
    changed(tiny, "  kind: label\n  labels: [urgent, normal]", "  kind: python\n  file: check.py")
    assert [problem.field for problem in problems(tiny)] == ["check.file"]
    (tiny.parent / "check.py").write_text("def same(a, b): return True", "utf-8")
    check = load_recipe(tiny).check
    assert isinstance(check, PythonCheck)
    assert check.file == tiny.parent.resolve() / "check.py"


def test_a_student_in_the_home_folder(tiny: Path) -> None:
    changed(tiny, "weights: smollm2-135m-instruct-q4_1", "weights: ~/models/mine")
    assert load_recipe(tiny).student.weights == str(Path("~/models/mine").expanduser().resolve())


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "said"),
    [
        (
            "  max_tokens: 8",
            "  prune: {drop_layers: 0}",
            14,
            "student.prune.drop_layers",
            "greater",
        ),
        ("name: tiny", "name: Tiny Recipe", 1, "name", "may have lower-case letters, digits and -"),
        ("  max_tokens: 8", "  max_tokns: 8", 14, "student.max_tokns", "unknown field"),
        ("description: S", "# description: S", 1, "description", "is required"),
        ("  kind: api", "  kind: apy", 5, "teacher.kind", "'apy'"),
        ("  base_url: http:", "  base_url: ftp:", 6, "teacher.base_url", "must match the pattern"),
        (":9/v1", ":9/v1/chat/completions", 6, "teacher.base_url", "leave /chat/completions out"),
        ("  max_tokens: 8", "  max_tokens: many", 14, "student.max_tokens", "got 'many'"),
        ("prompts: prompts.jsonl", "prompts: no.jsonl", 3, "prompts", "there is no file"),
        ("  max_tokens: 8", "  prompt: hi", 12, "student", "must contain {prompt}"),
        ("  licence: A", "  system: a\n  system_file: b\n  licence: A", 4, "teacher", "not both"),
        (
            "  kind: label",
            "  kind: regex\n  pattern: (a",
            11,
            "check.pattern",
            "no regular expression",
        ),
        ("  kind: label", "  kind: lable", 10, "check.kind", "'lable'"),
        ("name: tiny", "name: tiny\nname: tiny", 2, "name", "is given twice"),
        ("name: tiny", "name: [tiny", 2, "", "not valid YAML"),
    ],
)
def test_one_problem(tiny: Path, old: str, new: str, line: int, field: str, said: str) -> None:
    found = problems(changed(tiny, old, new))
    assert said in found[0].message
    assert (found[0].file, found[0].line, found[0].field) == ("recipe.yaml", line, field)


# Beside test_one_problem's: what a new recipe most often has wrong, and what is said to do.
END = "  max_tokens: 8\n"  # line 14; what comes after it begins on line 15


@pytest.mark.parametrize(
    ("more", "line", "field", "said"),
    [
        ("distill: {tunning: dora}", 15, "distill.tunning", "did you mean tuning?"),
        ("distill:\n  on-policy: {}", 16, "distill.on-policy", "did you mean on_policy?"),
        ("distill: {top_logprobs: 5}", 15, "distill.top_logprobs", "at teacher.sampling.top_logp"),
        ("method: sft", 15, "method", "it belongs at distill.method"),
        ("curate: {sample: 9}", 15, "curate.sample", "belongs at the top, beside name"),
        ("distill: {sample: 9}", 15, "distill.sample", "mean samples? Otherwise it belongs at"),
        ("zzz: 1", 15, "zzz", "misspelt, or of another version?"),
        ("distill: {proxy: none}", 15, "distill.proxy", "leave it out instead of none"),
        ("distill:\n  epochs:", 16, "distill.epochs", "is empty; give a number (passes over"),
        ("distill:\n  tuning:", 16, "distill.tuning", "is empty; give 'lora', 'dora', "),
        ("distill: {proxy: {weights: }}", 15, "distill.proxy.weights", "is empty; give a text (as"),
        ("distill:", 15, "distill", "is empty; give its fields, or leave it out"),
        ("distill:\n  shard: true\n  tuning: qlora", 16, "distill.shard", "or leave shard out"),
        ("distill:\n  compile: true\n  shard: true", 17, "distill.shard", "does not go with comp"),
        ("distill:\n  seed: 0\n  method: proxy", 17, "distill.method", "needs distill.proxy"),
        (
            "distill:\n  method: on-policy\n  on_policy:\n    start: proxy",
            18,
            "distill.on_policy.start",
            "needs distill.proxy",
        ),
        (
            "distill:\n  on_policy:\n    feedback: judge\n    max_calls: 0",
            18,
            "distill.on_policy.max_calls",
            "feedback judge asks the teacher",
        ),
        ("merge: {adapters: [../a]}", 15, "merge.adapters[0]", "as {path: ../a, weight: 1}"),
        ("curate: {split: {seed: -1}}", 15, "curate.split.seed", "greater than or equal to 0"),
    ],
)
def test_what_is_to_be_done(tiny: Path, more: str, line: int, field: str, said: str) -> None:
    (found,) = problems(changed(tiny, END, f"{END}{more}\n"))
    assert said in found.message
    assert (found.line, found.field) == (line, field)


@pytest.mark.parametrize(
    ("old", "new", "field", "said"),
    [
        ("kind: api", "kind: local", "base_url", "is not for kind local; remove it"),
        ("kind: api", "kind: api\n  threads: 2", "threads", "is not for kind api; remove it"),
        ("kind: api", "kind: api\n  api_key_env: None", "api_key_env", "leave it out for no key"),
        ("kind: api", "kind:", "kind", "is empty; give one of 'api', 'local'"),
        (
            "kind: api",
            "kind: api\n  sampling: {seed: -1}",
            "sampling.seed",
            "greater than or equal to 0",
        ),
        (
            "kind: api",
            "kind: api\n  sampling: {top_logprobs: none}",
            "sampling.top_logprobs",
            "leave it out instead of none",
        ),
    ],
)
def test_about_the_teacher(tiny: Path, old: str, new: str, field: str, said: str) -> None:
    found = {each.field: each.message for each in problems(changed(tiny, old, new))}
    assert said in found[f"teacher.{field}"]


def test_two_problems_in_one_file(tiny: Path) -> None:
    changed(tiny, "name: tiny", "name: Tiny")
    changed(tiny, "  max_tokens: 8", "  max_tokens: 0\n  temperature: 1")
    assert [(problem.line, problem.field) for problem in problems(tiny)] == [
        (1, "name"),
        (14, "student.max_tokens"),
        (15, "student.temperature"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "must be a mapping"), ("", "must be a mapping"), (None, "no such file")],
)
def test_not_a_recipe_at_all(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    assert said in problems(path)[0].message


def test_yaml_cannot_run_code(tiny: Path) -> None:
    changed(tiny, "name: tiny", "name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError):
        load_recipe(tiny)


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "said"),
    [
        ("[Q4_0, Q8_0]", "[Q4_0, Q9_9]", 5, "formats", "unknown formats Q9_9"),
        ("[Q4_0, Q8_0]", "[]", 5, "formats", "must not be empty"),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [Q8_0], fit: {seed: -1}}",
            3,
            "allocations[0].fit.seed",
            "greater than or equal to 0",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [Q8_0], fit: {epochs: .inf}}",
            3,
            "allocations[0].fit.epochs",
            "finite number",
        ),
        ("latency: measured", "latency: roofline", 6, "latency", "needs the field roofline"),
        ("class: board", "class: phone", 6, "latency", "a phone is not the machine that builds"),
        (
            "name: small",
            "name: small\nallocations: [{name: a, types: [Q8_0], fit: {}}]\n"
            "sources: {allocations.a.fit.seed: mine, gates.max_mean_kl: mine}",
            3,
            "sources.gates.max_mean_kl",
            "did you mean gates.max_mean_kld?",
        ),
        ("latency: measured", "latency: browser", 6, "latency", "needs runtime: wllama"),
        (
            "runtime: llama.cpp",
            "runtime: wllama\ngates: {max_file_mb: 80}",
            7,
            "latency",
            "for wllama write browser",
        ),
        (
            "runtime: llama.cpp\nformats: [Q4_0, Q8_0]\nlatency: measured",
            "runtime: wllama\nformats: [Q4_0]\nlatency: browser\ngates: {max_file_mb: 3000}",
            7,
            "gates",
            "at most 2147",
        ),
        ("[Q4_0, Q8_0]", "[Q4_K]", 5, "formats", "did you mean Q4_K_M or Q4_K_S?"),
        ("name: small", "name: small\nkernels: [q4_0]", 2, "kernels", "did you mean Q4_0?"),
        (
            "name: small",
            "name: small\nallocations:\n  - name: a\n    types: [Q4_0, Q8_0]",
            4,
            "allocations[0].types",
            "2 types need a budget to choose by: one of budget_mb, ",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [Q4_K_M], fit: {}}",
            3,
            "allocations[0].types",
            "did you mean Q4_K?",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [Q8_0], fit: }",
            3,
            "allocations[0].fit",
            "write `fit: {}` for the defaults",
        ),
        ("name: small", "name: small\nallocations:\n  mine: 1", 2, "allocations", "a list: begin"),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: F16, types: [Q8_0]}",
            3,
            "allocations[0].name",
            "F16 is a format's name; choose another",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: fp32, types: [Q8_0]}",
            3,
            "allocations[0].name",
            "fp32 is a format's name; choose another",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: my-own, types: [Q8_0]}",
            3,
            "allocations[0].name",
            "may have letters, digits and _, which is not the first (got 'my-own')",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - name: a\n    types: [Q8_0]\n    embedding: Q8",
            5,
            "allocations[0].embedding",
            "unknown types Q8",
        ),
        (
            "name: small",
            "name: small\nkernels: [Q8_0]\nallocations:\n  - name: a\n    types: [Q8_0]\n"
            "    embedding: Q4_0",
            6,
            "allocations[0].embedding",
            "no fast kernels for Q4_0",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [Q4_0, Q4_0], budget_mb: 9}",
            3,
            "allocations[0].types",
            "Q4_0 is given twice",
        ),
        (
            "name: small",
            "name: small\nallocations:\n  - {name: a, types: [int4-b32], importance: true}",
            3,
            "allocations[0].importance",
            "no search that an importance matrix could weigh",
        ),
        (
            "name: small",
            "name: small\ngates: {max_kl: 1}\ngates: {max_kl: 2, max_kld: 3}",
            3,
            "gates",
            "is given twice",  # and what is in it is not told again
        ),
        (
            "name: small",
            "name: small\ngates: {max_file_mb: 80}\nallocations:\n"
            "  - {name: a, types: [Q4_0, Q8_0], budget_mb: 92}",
            4,
            "allocations[0].budget_mb",
            "92 is more than gates.max_file_mb allows: 80",
        ),
        (
            "runtime: llama.cpp",
            "runtime: onnxruntime-genai",
            5,
            "formats",
            "unknown formats Q4_0, Q8_0; onnxruntime-genai takes",  # and nothing else was meant
        ),
        ("[Q4_0, Q8_0]", "[q4_k_m]", 5, "formats", "did you mean Q4_K_M?"),
        ("[Q4_0, Q8_0]", "['Q8_0:imatrx']", 5, "formats", "did you mean Q8_0:imatrix?"),
        ("[Q4_0, Q8_0]", "['F16:imatrix']", 5, "formats", "did you mean F16?"),
        ("[Q4_0, Q8_0]", "Q4_0", 5, "formats", "must be a list: [a, b] (got 'Q4_0')"),
        ("budget_mb: 300", "budget_mb: -1", 7, "memory_budget_mb", "greater than 0"),
        ("name: small", "name: small\ngates: {max_kl: 1}", 2, "gates.max_kl", "unknown field"),
    ],
)
def test_target_problem(
    tmp_path: Path, old: str, new: str, line: int, field: str, said: str
) -> None:
    path = tmp_path / "small.yaml"
    assert old in TARGET
    path.write_text(TARGET.replace(old, new), "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_target(path, "small.yaml")
    (problem,) = caught.value.problems
    assert (problem.line, problem.field) == (line, field)
    assert said in problem.message


def test_target_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    more = """\
kernels: [Q8_0]
sources: {gate: mine}
allocations:
  - {name: F16, types: [Q3_K, Q8_0], budget_mb: 400}
  - {name: b, types: [int4-b32]}
"""
    path.write_text(TARGET.replace("[Q4_0, Q8_0]", "[Q4_9]") + more, "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_target(path, "small.yaml")
    assert [(problem.line, problem.field) for problem in caught.value.problems] == [
        (5, "formats"),
        (11, "allocations[0].name"),
        (11, "allocations[0].types"),
        (11, "allocations[0].budget_mb"),
        (12, "allocations[1].types"),
        (9, "sources.gate"),
    ]


def test_frozen(tiny: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(tiny).name = "other"  # type: ignore[misc]


def test_lines_of_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\n  b:\n    - 1\n    - c: 2\n", "utf-8")
    document = load(path)
    assert document.line(("a", "b", 1, "c")) == 4
    assert document.line(("a", "b", 1, "missing")) == 4
    assert dotted(("a", "b", 1, "c")) == "a.b[1].c"
