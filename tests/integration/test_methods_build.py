"""Methods beside the teacher's text, by the command line: what they leave, tell and refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import MODEL, FakeTeacher
from tiny import tiny_student
from world import API_TEACHER, RECIPE, World, make_world, write_tiny_gguf

pytestmark = pytest.mark.integration
LORA = {"rank": 8, "alpha": 16}
PROXY = {"weights": "proxy.gguf", "lora": LORA, "rounds": 1, "top_k": 5, "min_agreement": 0}


def said(prompt: str) -> str:
    """The word that is to be said; as a judge, that the second answer is better."""
    return "B" if "Answer B:" in prompt else prompt.rsplit(" ", 1)[-1]


def spelled(text: str) -> dict[str, Any]:
    """Log-probabilities of an answer, a token a character."""

    def token(piece: str, chance: float) -> dict[str, Any]:
        return {"token": piece, "bytes": list(piece.encode()), "logprob": chance}

    each = [{**token(c, -0.1), "top_logprobs": [token(c, -0.1), token("x", -3)]} for c in text]
    end = {"token": "<end>", "bytes": [], "logprob": -0.05, "top_logprobs": []}
    return {"content": [*each, end]}


@pytest.fixture(scope="module")
def teacher() -> Iterator[FakeTeacher]:
    with FakeTeacher(answer=said, logprobs=spelled) as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, teacher: FakeTeacher) -> World:
    home = tmp_path_factory.mktemp("methods")
    world = make_world(home, {**API_TEACHER, "base_url": teacher.base_url}, prompts=24)
    write_tiny_gguf(tiny_student(home / "proxy", seed=3), home / "recipe" / "proxy.gguf")
    return world


def teach(world: World, **method: Any) -> None:
    """Change how the student learns."""
    file = world.home / "recipe" / "recipe.yaml"
    recipe = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**recipe, "distill": {**RECIPE["distill"], **method}}), "utf-8")


def ask_logprobs(world: World, count: int | None) -> None:
    file = world.home / "recipe" / "recipe.yaml"
    recipe = json.loads(file.read_text("utf-8"))
    recipe["teacher"]["sampling"] = {} if count is None else {"top_logprobs": count}
    file.write_text(json.dumps(recipe), "utf-8")


def test_a_bundle_tells_of_its_proxy(world: World) -> None:
    teach(world, method="proxy", proxy=PROXY)
    world.run()
    manifest = json.loads((world.bundle / "manifest.json").read_text("utf-8"))
    stages = manifest["provenance"]
    assert {"student of the proxy", "proxy", "proxy-round", "targets", "distill"} <= stages.keys()
    card = (world.bundle / "MODEL_CARD.md").read_text("utf-8")
    assert "| proxy (its probabilities were learned) |" in card
    assert re.search(r"likeliest tokens, weighted by how likely it finds each answer", card)
    assert re.search(r"The proxy is .*2 epochs of the teacher's text, [01] of 1 alignment", card)
    assert "These are known of 100.0% of the answers' tokens" in card


def test_status_plans_it_and_nothing_is_made_twice(world: World) -> None:
    teach(world, method="proxy", proxy=PROXY)
    done = world.call("status", "--recipe", "recipe", "--target", "target.yaml", "--json")
    plan = {step[0]: step[1] for step in json.loads(done.stdout)["plan"]}
    assert {plan[name] for name in ("proxy", "proxy-round", "targets", "distill")} == {"reused"}


def test_a_proxy_answers_prompts_that_the_teacher_is_not_asked(
    world: World, teacher: FakeTeacher
) -> None:
    lines = [json.dumps({"id": f"m{i}", "prompt": f"and the word {i}"}) for i in range(6)]
    (world.home / "recipe" / "further.jsonl").write_text("\n".join(lines), "utf-8")
    teach(world, method="proxy", proxy={**PROXY, "prompts": "further.jsonl", "keep": 1.0})
    before = teacher.calls
    world.run("distill")
    assert teacher.calls == before
    found = json.loads((world.stages()["proxy-answers"] / "manifest.json").read_text("utf-8"))
    assert found["facts"]["asked"] == 6
    teach(world, method="proxy", proxy={**PROXY, "prompts": "nowhere.jsonl"})
    done = world.call("validate", "--recipe", "recipe", "--target", "target.yaml")
    assert (done.returncode, "distill.proxy.prompts" in done.stderr) == (1, True)


def test_an_unaligned_proxy_ends_with_its_own_exit_code(world: World) -> None:
    teach(world, method="proxy", proxy={**PROXY, "min_agreement": 1.0, "warm_up_epochs": 0.1})
    done = world.run("distill", check=False)
    assert done.returncode == 3, done.stderr
    assert "gate failed at step 'proxy'" in done.stderr
    assert "below distill.proxy.min_agreement (1)" in done.stderr
    assert "raise distill.proxy.warm_up_epochs" in done.stderr


def test_the_teachers_probabilities(world: World) -> None:
    teach(world, method="logits")
    ask_logprobs(world, None)
    refused = world.run("distill", check=False)
    assert refused.returncode == 1
    assert "distill.method: logits learns from the teacher's log-probabilities" in refused.stderr
    ask_logprobs(world, 2)
    world.run("distill")
    manifest = world.stages()["targets"] / "manifest.json"
    facts = json.loads(manifest.read_text("utf-8"))["facts"]
    assert facts["coverage"] == 1
    ask_logprobs(world, None)


def test_on_policy_rounds_are_paid_once(world: World, teacher: FakeTeacher) -> None:
    rounds = {"feedback": "judge", "rounds": 2, "samples": 2, "max_calls": 9}
    teach(world, method="on-policy", on_policy=rounds)
    before = teacher.calls
    done = world.run("distill")
    facts = json.loads((world.stages()["refine"] / "manifest.json").read_text("utf-8"))["facts"]
    assert 0 < facts["teacher_calls"] == teacher.calls - before <= 9
    assert "on-policy round 1: wrong on" in done.stderr
    feedback = (world.stages()["refine"] / "feedback.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["model_answered"] for line in feedback} == {f"{MODEL}-2026"}
    again = world.run("distill")
    assert "on-policy round" not in again.stderr
    assert facts["teacher_calls"] == teacher.calls - before


def test_a_proxy_is_looked_at_before_work(world: World) -> None:
    teach(world, method="proxy", proxy={**PROXY, "weights": "missing.gguf"})
    done = world.call("validate", "--recipe", "recipe", "--target", "target.yaml")
    assert done.returncode == 1
    assert "distill.proxy.weights" in done.stderr
    teach(world, method="proxy")
    done = world.call("validate", "--recipe", "recipe", "--target", "target.yaml")
    assert "distill.method: proxy needs distill.proxy" in done.stderr
