"""Chat template, prompt, stop token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import STOP, TEMPLATE, tiny_student

from edgedistill.errors import WeightsError
from edgedistill.prompting import TOKENIZER_CONFIG, StudentPrompt
from edgedistill.recipe import StudentSpec

SPEC = StudentSpec(weights="tiny", system="Be short.", prompt="Q: {prompt} {x}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_student(tmp_path / "student").folder


def configure(folder: Path, **changes: Any) -> StudentPrompt:
    path = folder / TOKENIZER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return StudentPrompt(folder, SPEC)


def test_render_keeps_braces_of_the_user(folder: Path) -> None:
    assert StudentPrompt(folder, SPEC).render("a {prompt} {y}") == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\nQ: a {prompt} {y} {x}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_was_said_before_is_shown(folder: Path) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    prompt = StudentPrompt(folder, SPEC.model_copy(update={"system": "short"}))
    shown = prompt.messages("x", said)
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "user"]
    assert prompt.render("x", said).index("hello") < prompt.render("x", said).rindex("x")
    own = [{"role": "system", "content": "own"}, *said]
    assert [m["content"] for m in prompt.messages("x", own)[:2]] == ["own", "hi"]


def test_answer_ends_with_its_one_stop_token(folder: Path) -> None:
    prompt = StudentPrompt(folder, SPEC)
    ids = prompt.answer_ids("the answer")
    assert ids.count(STOP) == 1
    assert ids[-1] == STOP
    assert prompt.stop_ids == {STOP}
    assert prompt.decode(ids[:-1]) == "the answer"


@pytest.mark.parametrize("text", ["thé  日本\n", "😀 <|im_end|>", " 12"])
def test_decode_gives_back_what_was_encoded(folder: Path, text: str) -> None:
    prompt = StudentPrompt(folder, SPEC)
    assert prompt.decode(prompt.encode(text)) == text


def test_bos_is_added_once(folder: Path) -> None:
    plain = configure(folder, chat_template=TEMPLATE).prompt_ids("x")
    own = "{{ bos_token }}" + TEMPLATE
    with_bos = configure(folder, bos_token="<|endoftext|>", add_bos_token=True)
    assert with_bos.prompt_ids("x") == [0, *plain]
    assert configure(folder, chat_template=own).prompt_ids("x") == [0, *plain]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        (TEMPLATE.replace("+ '<|im_end|>'", "+ '<|endoftext|>'"), "would never stop"),
        (TEMPLATE.replace("{{ '<|im_start|>assistant\n' }}", "Bot:"), "right behind"),
    ],
)
def test_template_that_cannot_prompt_is_refused(
    folder: Path, template: str | None, said: str
) -> None:
    with pytest.raises(WeightsError, match=said):
        configure(folder, chat_template=template)


def test_stop_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="not in its vocabulary"):
        configure(folder, eos_token="</s>")
