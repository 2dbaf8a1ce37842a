from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Ran
from fakes import Dying, run_dying

from edgedistill.errors import (
    ArtifactError,
    ConfigError,
    DatasetError,
    EdgedistillError,
    RuntimeFailure,
    UsageError,
)
from edgedistill.evaluate import Plan, evaluate
from edgedistill.evaluate.asking import Asking
from edgedistill.evaluate.evaluation import read_evaluation, write_evaluation
from edgedistill.evaluate.kept import Kept
from edgedistill.evaluate.models import cut, find_subject, open_model
from edgedistill.export.gguf import Provenance, write_gguf
from edgedistill.onnx_builder import build_onnx
from edgedistill.progress import Progress, Silent
from edgedistill.student import TOKENIZER_GGUF

QUESTION, CHOICES = "the canoe on the", (" others", " thing")
KINDS = ("checkpoint", "model.gguf", "onnx")
TASK = {
    "task": "choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITING = {
    "task": "writing",
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
WORDS = {
    "task": "words",
    "output_type": "loglikelihood_rolling",
    "doc_to_choice": None,
    "doc_to_target": "{{question}}",
    "doc_to_text": "",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity",
         "higher_is_better": False}
    ],
}  # fmt: skip
TOKENS = len(tiny.SPECIAL) + 256 + len(tiny.MERGES)
Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    student = tiny.tiny_student(folder / "checkpoint").folder
    made_from = Provenance("recipe", "example/Tiny-2M-Instruct", "Apache-2.0", "digest")
    write_gguf(student, student / TOKENIZER_GGUF, folder / "model.gguf", made_from, Silent())
    build_onnx(student, folder / "onnx", "fp32")
    return folder


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed (600 MB)")


def write_task(folder: Path, task: dict[str, Any] = TASK, rows: int = 4) -> Path:
    """A task file with its data beside it."""
    lines = [
        {"question": f"{QUESTION} {n}", "choices": [*CHOICES, " a"], "answer": n % 3}
        for n in range(rows)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    merged = TASK | task
    file = folder / f"{merged['task']}.yaml"
    fields = {name: value for name, value in merged.items() if value is not None}
    file.write_text(json.dumps(fields), "utf-8")  # JSON is YAML
    return file


def plan(*tasks: object, **more: Any) -> Plan:
    return Plan(tuple(map(str, tasks)), threads=1, **more)


# ---- models: no lm-eval is needed


def test_each_kind_of_model_is_as_likely_to_say_it(models: Path) -> None:
    found = []
    for name in KINDS:
        with open_model(find_subject(models / name), 256, 1) as model:
            before = model.encode(QUESTION)
            answers = [model.tokens(choice) for choice in CHOICES]
            scored = [model.likelihood([*before, *answer], len(before)) for answer in answers]
            again = model.likelihood([*before, *answers[0]], len(before))
            assert again == pytest.approx(scored[0])
            every = [model.likelihood([*before, token], len(before)) for token in range(TOKENS)]
            (greedy,) = [token for token, (_, likeliest) in enumerate(every) if likeliest]
            assert every[greedy] == max(every)
            found.append(([value for value, _ in scored], model.parameters, model.prefix, greedy))
    for scored, *facts in found[1:]:
        assert scored == pytest.approx(found[0][0], abs=0.02)
        assert facts == list(found[0][1:])


def test_a_long_text_is_scored_in_parts(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(find_subject(models / "model.gguf"), 256, 1) as model:
        ids = model.encode(QUESTION * 5)
        whole = model.likelihood(ids, 1)
    monkeypatch.setattr("edgedistill.evaluate.models.LOGIT_BYTES", 4 * TOKENS * 7)
    monkeypatch.setattr("edgedistill.evaluate.models.ROWS", 3)
    with open_model(find_subject(models / "model.gguf"), 256, 1) as model:
        assert model.likelihood(ids, 1) == (pytest.approx(whole[0], abs=1e-3), whole[1])


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_model_is_shown_its_own_template(models: Path, name: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I say"}]
    with open_model(find_subject(models / name), 256, 1) as model:
        expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert model.render(messages[:1]) == expected
        assert model.render(messages) == f"{expected}I say"


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_is_cut_at_a_stop_text(models: Path, name: str) -> None:
    with open_model(find_subject(models / name), 256, 1) as model:
        ids = model.encode(QUESTION)
        whole = model.generate(ids, 16, ())
        assert model.generate(ids, 16, (whole[3:5], "never")) == cut(whole, (whole[3:5],))


def test_the_first_of_the_stops_counts() -> None:
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one two", ("four",)) == "one two"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "no model in this folder"), (tmp_path / "x", "no such file")):
        with pytest.raises(ArtifactError, match=said):
            find_subject(path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with (
        pytest.raises((ArtifactError, RuntimeFailure)),
        open_model(find_subject(tmp_path / "bad.gguf"), None, 1),
    ):
        pass


def test_a_context_beyond_what_was_learnt_is_refused(models: Path) -> None:
    for name in KINDS:
        with (
            pytest.raises(UsageError, match="beyond the 512 tokens"),
            open_model(find_subject(models / name), 513, 1),
        ):
            pass


def test_what_a_result_says_of_each_kind(models: Path) -> None:
    facts = [find_subject(models / name).facts() for name in KINDS]
    assert [each["runtime"] for each in facts] == ["torch", "llama.cpp", "onnxruntime-genai"]
    assert len({each["sha256"] for each in facts}) == len(KINDS)
    assert len({frozenset(each) for each in facts}) == 1


# ---- answers that are kept


def test_answers_are_found_again_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    with Kept(tmp_path, {"model": "a"}) as kept:
        kept.put("answer", ["q", 1], "yes")
        kept.put("answer", ["q", 2], "no")
    whole = kept.file.read_bytes()
    kept.file.write_bytes(whole[:-5])
    with Kept(tmp_path, {"model": "a"}) as again:
        assert again.get("answer", ["q", 1]) == "yes"
        assert again.get("answer", ["q", 2]) is None
        again.put("answer", ["q", 2], "no")
    with Kept(tmp_path, {"model": "a"}) as third, Kept(tmp_path, {"model": "b"}) as other:
        assert third.get("answer", ["q", 2]) == "no"
        assert other.get("answer", ["q", 1]) is None


class Sayer:
    """A model whose answers cost nothing; it remembers what it was asked."""

    parameters, context_tokens, prefix = 1, 8, 0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())

    encode = tokens

    def likelihood(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        self.asked.append((list(ids), first))
        return -1.0, True

    def generate(self, ids: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        self.asked.append((list(ids), max_tokens))
        return "said"

    def render(self, messages: Sequence[Any]) -> str:
        return ""


def test_what_does_not_fit_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    model = Sayer()
    with Kept(tmp_path, {}) as kept:
        asking = Asking(model, kept, Silent())
        asking.likelihood(range(7), [9])
        asking.likelihood(range(20), [8, 9])
        asking.answer("0123456789", 100, ())
        assert model.asked == [
            ([*range(7), 9], 7),
            ([14, 15, 16, 17, 18, 19, 8, 9], 6),
            (list(b"6789"), 4),
        ]
        assert asking.truncated == 2
        asking.likelihood(range(7), [9])
        assert (len(model.asked), asking.reused) == (3, 1)
        for answer in ([], list(range(8))):
            with pytest.raises(UsageError):
                asking.likelihood([1], answer)


# ---- lm-eval's tasks


def test_a_local_task_has_one_score_on_every_kind(
    models: Path, tmp_path: Path, harness: None
) -> None:
    tasks = [write_task(tmp_path, task) for task in (TASK, WRITING, WORDS)]
    found = {}
    for name in KINDS:
        done = evaluate(models / name, plan(*tasks), tmp_path, Silent())
        found[name] = {each.name: each for each in done.tasks}
        write_evaluation(done, tmp_path / "result.json")
        assert read_evaluation(tmp_path / "result.json").to_json() == done.to_json()
        assert done.settings["lm_eval"]
    for name in KINDS[1:]:
        ours, theirs = found[name], found["checkpoint"]
        assert ours["choices"].rows == theirs["choices"].rows
        assert ours["writing"].scores == theirs["writing"].scores
        perplexity = [each["words"].scores["word_perplexity"] for each in (ours, theirs)]
        assert perplexity[0].value == pytest.approx(perplexity[1].value, rel=0.02)
        assert not perplexity[0].higher_is_better
    assert len(found["onnx"]["choices"].rows) == 4


def test_the_likelihood_is_that_of_lm_evals_own_model(
    models: Path, tmp_path: Path, harness: None
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from edgedistill.evaluate.harness import EdgeLM

    requests = [
        Instance("loglikelihood", {}, pair, 0)
        for pair in ((QUESTION, CHOICES[0]), (f"{QUESTION} ", "others"), ("", "the thing"))
    ]
    theirs = HFLM(pretrained=str(models / "checkpoint"), device="cpu", batch_size=1)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    with (
        open_model(find_subject(models / "checkpoint"), 256, 1) as model,
        Kept(tmp_path, {}) as kept,
    ):
        ours = EdgeLM(Asking(model, kept, Silent()), "").loglikelihood(requests)
    assert [value for value, _ in ours] == pytest.approx([v for v, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def dying_run(model: str, task: str, root: str) -> None:
    evaluate(Path(model), plan(task), Path(root), Dying("asking", 5))


def test_a_killed_run_goes_on(models: Path, tmp_path: Path, harness: None) -> None:
    task = write_task(tmp_path)
    run_dying(__file__, models / "model.gguf", task, tmp_path / "ws")
    done = evaluate(models / "model.gguf", plan(task), tmp_path / "ws", Silent())
    assert any(note.startswith("5 answers are of an earlier run") for note in done.notes)
    fresh = evaluate(models / "model.gguf", plan(task), tmp_path / "other", Silent())
    assert done.tasks == fresh.tasks


def test_limit_and_chat_are_told_apart(models: Path, tmp_path: Path, harness: None) -> None:
    task = write_task(tmp_path)
    done = evaluate(
        models / "model.gguf",
        plan(task, limit=2, chat=True, system="Be brief."),
        tmp_path,
        Silent(),
    )
    assert len(done.tasks[0].rows) == 2
    assert done.settings["chat"] is True
    other = evaluate(models / "model.gguf", plan(task, limit=2), tmp_path, Silent())
    assert other.notes == []  # other requests: nothing of the first run is used


def broken(folder: Path, name: str) -> tuple[Path, type[EdgedistillError], str]:
    """A task that cannot be used, and what is said of it."""
    if name == "yaml":
        (folder / "broken.yaml").write_text("task: x\ndoc_to_text: [a\n", "utf-8")
        return folder / "broken.yaml", ConfigError, "no YAML"
    if name == "missing":
        return folder / "missing.yaml", UsageError, "no such task file"
    if name == "line":
        file = write_task(folder)
        (folder / "rows.jsonl").write_text('{"question": "a"}\n{broken\n', "utf-8")
        return file, DatasetError, "its data cannot be read"
    changed: dict[str, tuple[dict[str, Any], type[EdgedistillError], str]] = {
        "data": ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, DatasetError, "not there"),
        "key": ({"doc_to_txt": "{{question}}"}, ConfigError, "doc_to_txt"),
        "split": ({"test_split": "tset"}, ConfigError, "tset"),
        "name": ({"task": 3}, ConfigError, "names one task"),
        "code": ({"unsafe_code": True}, UsageError, "unguarded"),
        "fields": ({"doc_to_target": "{{nothing}}"}, ConfigError, "cannot be used"),
        "drawn": (
            {**WRITING, "generation_kwargs": {"do_sample": True, "temperature": 0.8}},
            UsageError,
            "at random",
        ),
    }
    fields, error, said = changed[name]
    return write_task(folder, fields | {"task": fields.get("task", "broken")}), error, said


@pytest.mark.parametrize(
    "name", ["yaml", "missing", "line", "data", "key", "split", "name", "code", "fields", "drawn"]
)
def test_a_task_that_cannot_be_used_is_refused(
    models: Path, tmp_path: Path, harness: None, name: str
) -> None:
    file, error, said = broken(tmp_path, name)
    with pytest.raises(error) as raised:
        evaluate(models / "model.gguf", plan(file), tmp_path, Silent())
    assert said in str(raised.value)
    assert file.stem in str(raised.value)


def test_an_unknown_task_names_the_nearest(run: Run, models: Path, harness: None) -> None:
    ran = run("evaluate", str(models / "model.gguf"), "--tasks", "arc_esy")
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean arc_easy?" in ran.err


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_task_that_runs_code_is_refused_without_a_network(
    run: Run, models: Path, harness: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    ran = run("evaluate", str(models / "model.gguf"), "--tasks", name)
    assert ran.code == 2, ran.err
    assert "humaneval:FILE.jsonl" in ran.err


def test_data_that_cannot_be_had_is_told(
    models: Path, tmp_path: Path, harness: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = write_task(tmp_path, {"dataset_path": "nobody/nothing", "dataset_kwargs": None})
    with pytest.raises(DatasetError, match="data of this task cannot be had"):
        evaluate(models / "model.gguf", plan(task), tmp_path, Silent())


def test_without_lm_eval_it_is_said_how_to_get_it(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "edgedistill.evaluate.harness", raising=False)
    monkeypatch.delattr("edgedistill.evaluate.harness", raising=False)
    ran = run("evaluate", str(models / "model.gguf"), "--tasks", "arc_easy")
    assert ran.code == 1
    assert "lm-eval is not installed" in ran.err
    assert 'pip install "edgedistill[evaluate]"' in ran.err


# ---- the command


def test_the_command_shows_and_keeps_the_result(
    run: Run, models: Path, tmp_path: Path, harness: None
) -> None:
    words = ["evaluate", str(models / "model.gguf"), "--tasks", str(write_task(tmp_path))]
    words += ["--workspace", str(tmp_path / "ws"), "--threads", "1"]
    ran = run(*words, "--out", str(tmp_path / "r.json"), "--json")
    assert ran.code == 0, ran.err
    assert ran.json == read_evaluation(tmp_path / "r.json").to_json()
    ran = run(*words)
    assert "choices" in ran.out
    assert "12 answers are of an earlier run" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "a,,b"], "empty name"),
        (["--tasks", "a", "--system", "x"], "--system is for --chat"),
        (["--tasks", "a", "--out", "nowhere/r.json"], "no folder nowhere"),
        (["--tasks", "a,a"], "twice"),
        ([], "Missing option '--tasks'"),
    ],
)
def test_usage_that_cannot_be(run: Run, words: list[str], said: str) -> None:
    ran = run("evaluate", "model.gguf", *words)
    assert ran.code == 2
    assert said in ran.err


if __name__ == "__main__":
    progress: Progress = Silent()
    os.environ["TQDM_DISABLE"] = "1"
    dying_run(*sys.argv[1:])
