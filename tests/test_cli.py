"""Every command: exit code and output, bad input included. Builds run in tests/integration."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import Ran

from edgedistill import __version__
from edgedistill.cli import ONCE_PER_RECIPE, cli
from edgedistill.errors import ConfigError, GateFailed, Problem, TeacherRefused, UsageError

Run = Callable[..., Ran]
STAGES = (*ONCE_PER_RECIPE, "quantize", "bench", "pack")
COMMANDS = (
    *("build", *STAGES, "init", "validate", "recipes", "targets"),
    *(
        "status",
        "gc",
        "doctor",
        "completion",
        "sweep",
        "learning-curve",
        "compare",
        "history",
        "predict",
        "judge",
        "evaluate",
        "retention",
        "lora",
        "adapt",
        "update",
    ),
)
ERRORS = {
    "refused": (TeacherRefused("401: wrong key", where="http://x/v1", hint="set TEACHER_KEY"), 1),
    "config": (ConfigError([Problem("r.yaml", 3, "name", "is required")]), 1),
    "usage": (UsageError("there is no such thing"), 2),
    "gate": (GateFailed("quantize", "no candidate passed", where="quantize-00"), 3),
    "interrupt": (KeyboardInterrupt(), 130),
    "exit": (click.exceptions.Exit(1), 1),
    "system": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/ws"), 1),
}
TOLD = ("refused", "config", "usage", "gate")
TARGETS = Path(__file__).resolve().parent.parent / "targets"
SHIPPED_TARGETS = sorted(file.stem for file in TARGETS.glob("*.yaml"))


@pytest.fixture
def explode() -> Iterator[None]:
    """A command that raises one of ERRORS, as any command might."""

    @cli.command()
    @click.argument("kind")
    def explode(kind: str) -> None:
        raise ERRORS[kind][0]

    yield
    del cli.commands["explode"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_every_command_is_tested() -> None:
    assert set(cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    result = run(command, "-h")
    assert result.code == 0
    assert result.out.startswith(f"Usage: edgedistill {command} ")


def test_help_lists_commands_in_order(run: Run) -> None:
    out = run("--help").out
    places = [out.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_version(run: Run) -> None:
    assert run("--version").out == f"edgedistill, version {__version__}\n"


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.usefixtures("explode")
def test_errors_say_what_where_and_what_to_do(run: Run, kind: str) -> None:
    error, code = ERRORS[kind]
    result = run("explode", kind)
    assert (result.code, result.out) == (code, "")
    assert result.err == f"error: {error}\n"


@pytest.mark.usefixtures("explode")
def test_what_the_system_refuses_is_an_error_too(run: Run) -> None:
    result = run("explode", "system")
    assert result.code == 1
    assert result.err.startswith("error: /proc/ws: No such file or directory\n")
    assert run("--json", "explode", "system").json["error"]["kind"] == "StorageError"
    assert "Traceback" in run("--debug", "explode", "system").err


@pytest.mark.usefixtures("explode")
def test_errors_as_json(run: Run) -> None:
    result = run("--json", "explode", "config")
    assert (result.code, result.err) == (1, "")
    assert result.json["error"]["kind"] == "ConfigError"
    assert result.json["error"]["problems"] == [
        {"file": "r.yaml", "line": 3, "field": "name", "message": "is required"}
    ]
    assert run("--json", "explode", "gate").json["error"]["step"] == "quantize"


@pytest.mark.usefixtures("explode")
def test_debug_shows_the_traceback(run: Run) -> None:
    assert "Traceback" in run("--debug", "explode", "refused").err
    assert "Traceback" not in run("explode", "refused").err


@pytest.mark.usefixtures("explode")
def test_a_command_can_choose_its_exit_code(run: Run) -> None:
    assert run("explode", "exit") == Ran(1, "", "")  # as doctor does when something is missing


@pytest.mark.usefixtures("explode")
def test_interrupt_says_that_work_is_kept(run: Run) -> None:
    result = run("explode", "interrupt")
    assert (result.code, result.out) == (130, "")
    assert result.err.strip().splitlines() == [
        "interrupted; what was finished is kept: run the same command again to go on"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("buidl",), "No such command 'buidl'"),
        (("build", "--colour"), "No such option"),
        (("build", "--recipe", "suport-sql"), "did you mean support-sql?"),
        (("build", "--target", "labtop"), "did you mean laptop?"),
        (("validate", "--target", "nothing-like-it"), f"known: {', '.join(SHIPPED_TARGETS)}"),
        (("targets", "fone"), "did you mean phone?"),
        (("init",), "Missing argument 'NAME'"),
        (("init", "Not A Name"), "lower-case letters"),
        (("completion", "tcsh"), "'tcsh' is not one of"),
        (("export", "--layout", "coreml"), "'coreml' is not one of"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_usage_exits_2(run: Run, words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    as_json = run(*words, "--json")
    assert as_json.code == as_json.json["error"]["exit_code"] == 2


def test_no_arguments_show_help(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "Commands:" in result.out + result.err


def test_init_makes_a_valid_recipe(run: Run, here: Path) -> None:
    result = run("init", "my-task")
    assert result.code == 0
    recipe = here / "recipes/my-task/recipe.yaml"
    fresh = run("validate", "--recipe", "my-task", "--target", "laptop")
    assert (fresh.code, fresh.err.count("recipe.yaml:")) == (1, 1)
    assert "teacher.model: is still the template's" in fresh.err
    edit(recipe, "the-model-id", "my-model")
    assert run("validate", "--recipe", "my-task", "--json").json["recipes"] == {"my-task": 4}
    again = run("init", "my-task")
    assert again.code == 2
    assert "take another name" in again.err


def test_validate_checks_everything_known(run: Run, tiny: Path) -> None:
    value = run("validate", "--json").json
    assert value["recipes"]["tiny"] == 20
    assert value["recipes"]["support-sql"] >= 500
    assert value["targets"] == [*SHIPPED_TARGETS, "small"]


@pytest.mark.parametrize("command", [("validate",), ("build",), ("status",), ("curate",)])
def test_all_problems_of_all_files_at_once(run: Run, tiny: Path, command: tuple[str]) -> None:
    edit(tiny, "max_tokens: 8", "max_tokens: 0\n  max_tokenz: 8")
    edit(tiny.parents[2] / "targets/small.yaml", "Q4_0", "Q4_9")
    targets = () if command == ("curate",) else ("--target", "small")
    result = run(*command, "--recipe", "tiny", *targets)
    assert (result.code, result.out) == (1, "")
    recipe = f"{Path('recipes/tiny/recipe.yaml')}"
    assert f"{recipe}:14: student.max_tokens: " in result.err
    assert f"{recipe}:15: student.max_tokenz: unknown field" in result.err
    if targets:
        assert f"{Path('targets/small.yaml')}:5: formats: unknown formats Q4_9" in result.err
        assert "error: 3 problems found" in result.err


def test_broken_prompts_are_told_beside_a_broken_recipe(run: Run, tiny: Path) -> None:
    edit(tiny, "max_tokens: 8", "max_tokenz: 8")
    edit(tiny.parent / "prompts.jsonl", '{"id": "p-3", "prompt"', '{"id": "p-3", prompt')
    result = run("validate", "--recipe", "tiny")
    assert "student.max_tokenz: unknown field" in result.err
    assert "prompts.jsonl:4: not a JSON object" in result.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: label", "kind: labels", "check.kind: 'labels' is none of 'sql-execution'"),
        ("smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m", "cannot be a student yet"),
        ("model: some", "api_key_env: sk-12\n  model: some", "never the key itself"),
        ("name: tiny", "name: other", "name: is 'other', but its folder is called 'tiny'"),
        (
            "model: some",
            "sampling: {top_logprobs: 21}\n  model: some",
            ":7: teacher.sampling.top_logprobs: Input should be less than or equal to 20",
        ),
    ],
)
def test_what_would_fail_later_is_told_at_once(
    run: Run, tiny: Path, old: str, new: str, said: str
) -> None:
    edit(tiny, old, new)
    result = run("validate", "--recipe", "tiny")
    assert result.code == 1
    assert said in result.err
    assert "sk-12" not in result.err


def test_missing_prompts_file(run: Run, tiny: Path) -> None:
    (tiny.parent / "prompts.jsonl").unlink()
    for command in ("validate", "build"):
        result = run(command, "--recipe", "tiny")
        assert result.code == 1
        assert "recipe.yaml:3: prompts: there is no file " in result.err


def test_broken_prompt_lines_are_named(run: Run, tiny: Path) -> None:
    prompts = tiny.parent / "prompts.jsonl"
    edit(prompts, '{"id": "p-3", "prompt"', '{"id": "p-3", prompt')
    edit(prompts, '"id": "p-7"', '"id": "p-6"')
    for command in ("validate", "build"):
        result = run(command, "--recipe", "tiny", "--quiet")
        assert result.code == 1
        assert "prompts.jsonl:4: not a JSON object" in result.err
        assert "prompts.jsonl:8: id: 'p-6' is already used in line 7" in result.err


def test_a_prompts_file_of_another_kind_is_told_in_few_lines(run: Run, tiny: Path) -> None:
    (tiny.parent / "prompts.jsonl").write_text("id,prompt\n" * 500, "utf-8")
    result = run("validate", "--recipe", "tiny")
    assert result.code == 1
    assert "500 problems found" in result.err
    assert "and 480 more" in result.err
    assert len(result.err.splitlines()) < 30


def test_recipe_and_target_must_fit(run: Run, tiny: Path) -> None:
    edit(tiny, "max_tokens: 8", "max_tokens: 4096")
    result = run("validate", "--recipe", "tiny", "--target", "small")
    assert result.code == 1
    assert "recipe.yaml:14: student.max_tokens: 4096 tokens of answer leave no room" in result.err


def test_unknown_weights(run: Run, tiny: Path) -> None:
    edit(tiny, "smollm2-135m-instruct-q4_1", "smollm3")
    result = run("validate", "--recipe", "tiny")
    assert result.code == 1
    assert "student.weights: no pinned weights 'smollm3'; known: " in result.err


def test_a_student_that_cannot_be(run: Run, tiny: Path) -> None:
    edit(tiny, "smollm2-135m-instruct-q4_1", "some/model@main")
    result = run("validate", "--recipe", "tiny")
    assert result.code == 1
    assert "recipe.yaml:13: student.weights: some/model@main: a hub model needs" in result.err
    (tiny.parent / "mine").mkdir()
    (tiny.parent / "mine" / "config.json").write_text('{"architectures": ["Odd"]}', "utf-8")
    edit(tiny, "some/model@main", "./mine")
    assert "'Odd' cannot be trained, only Llama and" in run("validate", "--recipe", "tiny").err


def test_files_that_are_not_what_they_are_called(run: Run, tiny: Path) -> None:
    for name in ("student.gguf", "my.db"):
        (tiny.parent / name).write_text("hello, this is some text", "utf-8")
    edit(tiny, "smollm2-135m-instruct-q4_1", "student.gguf")
    edit(
        tiny,
        "  kind: label\n  labels: [urgent, normal]",
        "  kind: sql-execution\n  database: my.db",
    )
    result = run("validate", "--recipe", "tiny")
    assert result.code == 1
    assert re.search(r"student.weights: \S+student.gguf: this is no sound GGUF file", result.err)
    assert re.search(r"check.database: \S+my.db is no SQLite database", result.err)


def test_recipes_and_targets_are_listed(run: Run, tiny: Path) -> None:
    recipes = {row["name"]: row for row in run("recipes", "--json").json}
    assert recipes["tiny"]["origin"] == "yours"
    assert recipes["support-sql"]["origin"] == "shipped"
    targets = {row["name"]: row for row in run("targets", "--json").json}
    assert list(targets) == [*SHIPPED_TARGETS, "small"]
    assert "support-sql" in run("recipes").out
    assert "Snapdragon" in run("targets").out


def test_a_broken_recipe_is_still_listed(run: Run, tiny: Path) -> None:
    edit(tiny, "name: tiny", "nam: tiny")
    result = run("recipes")
    assert result.code == 0
    assert "does not validate" in result.out


def test_targets_explains_each_field(run: Run) -> None:
    rows = {row["field"]: row for row in run("targets", "phone", "--json").json}
    bandwidth = rows["roofline.bandwidth_gb_s"]
    assert bandwidth["value"] == 76.8
    assert "GB/s" in bandwidth["meaning"]
    assert "Qualcomm" in bandwidth["source"]
    assert rows["gates.max_file_mb"]["source"] == "default"
    assert rows["allocations.mixed.types"]["value"] == ["Q4_0", "IQ4_NL", "Q8_0"]
    assert rows["allocations.mixed.fit.epochs"]["value"] == 2.5
    assert rows["allocations.mixed.fit.max_steps"]["value"] == 200
    assert "roofline.bandwidth_gb_s" in run("targets", "phone").out


def test_a_broken_target_nearby_stops_gc_and_not_status(run: Run, tiny: Path) -> None:
    targets = tiny.parents[2] / "targets"
    broken = (targets / "small.yaml").read_text("utf-8").replace("Q4_0", "Q4_9")
    (targets / "broken.yaml").write_text(broken, "utf-8")
    status = run("status", "--recipe", "tiny", "--target", "small", "--json").json
    assert [p for p in status["problems"] if "broken.yaml:" in p and "unknown formats" in p]
    refused = run("gc", "--yes")
    assert refused.code == 1
    assert "what they need is unknown: mend or move these files" in refused.err


def test_status_and_gc_of_an_empty_workspace(run: Run, tiny: Path) -> None:
    status = run("status", "--recipe", "tiny", "--target", "small", "--json").json
    assert status["folders"] == []
    assert [step[:2] for step in status["plan"]] == [["collect", "would run"]]
    assert run("gc", "--dry-run", "--json").json == {
        "removed": False, "folders": [], "answers_bytes": 0, "bytes": 0,
    }  # fmt: skip


def test_gc_says_that_the_answers_go(run: Run, tiny: Path) -> None:
    root = tiny.parents[2] / ".edgedistill"
    root.mkdir()
    (root / "traces.db").write_bytes(b"x" * 2_000_000)
    assert "answers" not in run("gc", "--dry-run").out
    assert "would remove the teacher's answers, 2" in run("gc", "--traces", "--dry-run").out


def test_a_recipe_without_its_student_is_left_out(run: Run, tiny: Path) -> None:
    gone = tiny.parents[1] / "gone" / tiny.name
    shutil.copytree(tiny.parent, gone.parent)
    edit(gone, "name: tiny", "name: gone")
    edit(gone, "smollm2-135m-instruct-q4_1", "gone.gguf")
    status = run("status", "--recipe", "tiny", "--target", "small", "--json")
    assert status.code == 0, status.err
    assert [text for text in status.json["problems"] if "gone.gguf" in text]
    refused = run("gc", "--dry-run")
    assert refused.code == 1
    assert "what they need is unknown" in refused.err


def test_gc_removes_what_no_recipe_reaches(run: Run, tiny: Path) -> None:
    old = tiny.parents[2] / ".edgedistill" / "merge-0123456789abcdef"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(b"x" * 1000)
    assert "merge-0123456789abcdef" in run("status", "--recipe", "tiny").out
    assert run("gc", "--json").code == 2  # a program must say --yes
    assert run("gc", "--dry-run").code == 0
    assert old.is_dir()
    result = run("gc", "--yes", "--json").json
    assert (result["removed"], result["bytes"]) == (True, 1000)
    assert not old.exists()


def test_gc_refuses_to_guess_what_a_broken_recipe_needs(run: Run, tiny: Path) -> None:
    old = tiny.parents[2] / ".edgedistill" / "merge-0123456789abcdef"
    old.mkdir(parents=True)
    edit(tiny, "name: tiny", "nam: tiny")
    assert run("gc", "--yes").code == 1
    assert old.is_dir()


def test_a_result_that_cannot_be_written_is_refused_before_the_work(run: Run, tiny: Path) -> None:
    full = tiny.parents[2] / "taken"
    full.write_text("a file", "utf-8")
    asked = ("--recipe", "tiny", "--workspace", "ws")
    for words in (
        ("build", *asked, "--target", "small", "--dist", str(full / "dist")),
        ("export", *asked, "--layout", "optimum", "--dist", str(full / "dist")),
        ("lora", *asked, "-o", str(full / "deep" / "adapter.gguf")),
    ):
        result = run(*words)
        assert (result.code, result.out) == (1, "")
        assert "nothing can be written there" in result.err
        assert str(full) in result.err
    assert not (tiny.parents[2] / "ws").exists()


@pytest.mark.usefixtures("here")
def test_doctor(run: Run) -> None:
    result = run("doctor", "--json")
    names = {row["name"] for row in result.json}
    assert {"cores", "memory", "disk", "gpu", "llama-cpp-python", "compiler"} <= names
    assert "smollm2-135m-instruct-q4_1" in names
    missing = [row for row in result.json if row["state"] == "missing"]
    assert result.code == (1 if missing else 0)
    assert all(row["hint"] for row in missing)


def test_doctor_says_which_of_several_recipes_a_row_is_of(run: Run, tiny: Path) -> None:
    other = tiny.parents[1] / "other"
    shutil.copytree(tiny.parent, other)
    edit(other / "recipe.yaml", "name: tiny", "name: other")
    asked = ("--recipe", "tiny")
    areas = [
        {row["area"] for row in run("doctor", *words, "--json").json if row["name"] == "teacher"}
        for words in (asked, (*asked, "--recipe", "other"))
    ]
    assert areas == [{"recipe"}, {"recipe tiny", "recipe other"}]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    result = run("completion", shell)
    assert result.code == 0
    assert "_EDGEDISTILL_COMPLETE" in result.out


def test_completion_knows_names(tiny: Path) -> None:
    asked = {"_EDGEDISTILL_COMPLETE": "bash_complete", "COMP_WORDS": "x build --recipe t"}
    code = "from edgedistill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "COMP_CWORD": "3", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "plain,tiny\n"


def test_an_unreachable_teacher(run: Run, tiny: Path) -> None:
    edit(tiny, "check:", "collect: {attempts: 1, backoff_seconds: 0.01}\ncheck:")
    result = run("collect", "--recipe", "tiny", "--json")
    assert result.code == 1
    assert result.json["error"]["kind"] == "TeacherUnreachable"
    assert "http://127.0.0.1:9/v1" in json.dumps(result.json)
    assert "collect: running" in result.err
    assert run("collect", "--recipe", "tiny", "--quiet").err.count("\n") <= 2


@pytest.mark.parametrize(
    "words",
    [
        ("sweep", "--learning-rate", ""),
        ("sweep", "--learning-rate", "1e-4,"),
        ("sweep", "--learning-rate", "fast"),
        ("sweep", "--learning-rate", "0"),
        ("sweep", "--learning-rate", "1e-4,-1e-4"),
        ("sweep", "--learning-rate", "nan"),
        ("sweep", "--rank", "0"),
        ("sweep", "--rank", "1.5"),
        ("sweep", "--rank", "100000"),
        ("sweep", "--epochs", "0"),
        ("sweep", "--learning-rate", ",".join(f"{i}e-6" for i in range(1, 66))),
        ("learning-curve", "--sizes", ""),
        ("learning-curve", "--sizes", "0,1"),
        ("learning-curve", "--sizes", "0.5,2"),
        ("learning-curve", "--sizes", "half"),
        ("learning-curve", "--seeds", "0"),
        ("learning-curve", "--seeds", "1000"),
    ],
    ids=" ".join,
)
def test_values_that_cannot_be_are_refused_before_any_work(
    run: Run, tiny: Path, here: Path, words: tuple[str, ...]
) -> None:
    result = run(*words, "--recipe", "tiny", "--json")
    assert result.code == 2
    assert result.json["error"]["kind"] == "UsageError"
    assert words[1] in result.json["error"]["what"] or "distill." in result.json["error"]["what"]
    assert not (here / ".edgedistill").exists()


@pytest.mark.parametrize("command", ["sweep", "learning-curve"])
def test_tuning_of_a_recipe_that_is_not_there(run: Run, here: Path, command: str) -> None:
    assert run(command, "--recipe", "nothing").code == 2
