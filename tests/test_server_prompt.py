"""How a server is asked: the URL, the key, and whose way it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.errors import TeacherRefused, UsageError
from edgedistill.fidelity import EvalRow
from edgedistill.recipe import load_recipe
from edgedistill.server_prompt import AskedServer, asked_server, is_url
from edgedistill.teacher import prompt_version

URL = "http://127.0.0.1:9/v1"
HISTORY = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
ROW = EvalRow("p1", "is {it} urgent", "", "", seen=False, history=HISTORY)
TEACHER = "  system: Be brief.\n  sampling: {max_tokens: 9, temperature: 0.5}\ncheck:"
STUDENT = 'student:\n  system: TAG\n  prompt: "tag: {prompt}"'


@pytest.mark.parametrize(
    ("text", "url"),
    [(URL, True), ("HTTPS://host/v1", True), ("host:8080/v1", False), ("http.gguf", False)],
)
def test_what_is_a_url(text: str, url: bool) -> None:
    assert is_url(text) is url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "names no host"),
        ("http:///v1", "names no host"),
        ("http://[::1", "this is no URL"),
        ("http://host:port/v1", "this is no URL"),
        ("http://me:secret@host/v1", "a user, a password or a query"),
        ("http://host/v1?key=secret", "a user, a password or a query"),
        (f"{URL}/chat/completions/", f"give it as {URL}$"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        asked_server(url, "m", None)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(TeacherRefused, match=r"A_KEY is not set\s+put the server's API key in"):
        asked_server(URL, "m", "A_KEY")


def messages(asked: AskedServer) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in asked.call(ROW).messages]


def test_without_a_recipe_prompts_go_as_they_are() -> None:
    asked = asked_server(URL, "m", None)
    assert messages(asked) == [("user", "a"), ("assistant", "b"), ("user", ROW.prompt)]
    assert asked.call(ROW).parameters == {"temperature": 0.0, "max_tokens": 128}
    assert asked.here
    assert not asked_server("http://host/v1", "m", None).here


@pytest.fixture
def recipe_file(tiny: Path) -> Path:
    text = tiny.read_text("utf-8").replace("check:", TEACHER, 1).replace("student:", STUDENT, 1)
    tiny.write_text(text, "utf-8")
    return tiny


def test_as_the_recipes_teacher(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    asked = asked_server(URL, "m", None, recipe)
    assert messages(asked)[0] == ("system", "Be brief.")
    assert messages(asked)[-1] == ("user", ROW.prompt)
    assert asked.call(ROW).parameters == {"temperature": 0.5, "max_tokens": 9}
    assert asked.call(ROW).prompt_version == prompt_version(recipe.teacher)


def test_as_the_recipes_student(recipe_file: Path) -> None:
    asked = asked_server(URL, "m", None, load_recipe(recipe_file), "student")
    assert messages(asked)[0] == ("system", "TAG")
    assert messages(asked)[-1] == ("user", f"tag: {ROW.prompt}")
    assert asked.call(ROW).parameters == {"temperature": 0.0, "max_tokens": 8}


def test_what_is_given_goes_before_the_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    asked = asked_server(URL, "m", None, recipe, system="Otherwise.", max_tokens=3)
    assert messages(asked)[0] == ("system", "Otherwise.")
    assert asked.call(ROW).parameters == {"temperature": 0.5, "max_tokens": 3}
    assert asked.call(ROW).prompt_version != prompt_version(recipe.teacher)


def test_each_way_has_a_prompt_version_of_its_own(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    ways = [asked_server(URL, "m", None, recipe, way) for way in ("teacher", "student")]
    ways += [asked_server(URL, "m", None), asked_server(URL, "m", None, system="S")]
    assert len({asked.teacher.prompt_version for asked in ways}) == len(ways)
