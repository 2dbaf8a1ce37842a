"""What shapes an adapter, and how a card tells it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from edgedistill.methods import DistillSpec, LogitsSpec, OnPolicySpec, ProxySpec
from edgedistill.report.lessons import lessons_of, unseen_met

PROXY = ProxySpec(weights="p.gguf", kl_weight=2.0)
WARMED = {
    "stage": "proxy",
    "facts": {
        "name": "org/proxy", "licence": "MIT", "steps": 40, "agreement_at_start": 0.1,
        "agreement": 0.6,
    },
}  # fmt: skip
TARGETS = {"stage": "targets", "facts": {"coverage": 0.98, "mean_known_mass": 0.9}}


def round_of(stage: str, before: float, after: float, calls: int = 0) -> dict[str, Any]:
    facts = {"agreement_before": before, "agreement": after, "kept": after > before}
    return {"stage": stage, "facts": {**facts, "teacher_calls": calls}}


def test_a_proxy_method_needs_a_proxy() -> None:
    for given in ({"method": "proxy"}, {"method": "on-policy", "on_policy": {"start": "proxy"}}):
        with pytest.raises(ValidationError, match=r"proxy needs distill\.proxy"):
            DistillSpec.model_validate(given)


@pytest.mark.parametrize(
    "other",
    [
        {"tuning": "full"},
        {"tuning": "qlora"},
        {"compile": True},
        {"proxy": {"weights": "p.gguf", "tuning": "qlora"}},
    ],
)
def test_what_cannot_be_sharded_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"leave (shard|one of them) out"):
        DistillSpec.model_validate({"shard": True, **other})


def test_only_what_shapes_the_adapter_is_in_its_identity() -> None:
    plain = DistillSpec().shaping()
    assert not {"logits", "proxy", "on_policy", "kl_weight", "processes", "shard"} & plain.keys()
    later = DistillSpec(method="on-policy", on_policy=OnPolicySpec(rounds=9), proxy=PROXY)
    assert later.shaping() == plain
    gated = DistillSpec(method="proxy", proxy=PROXY)
    looser = PROXY.model_copy(update={"min_agreement": 0.1, "rounds": 5})
    assert gated.shaping() == DistillSpec(method="proxy", proxy=looser).shaping()
    assert gated.shaping()["kl_weight"] == 2
    logits = DistillSpec(method="logits", logits=LogitsSpec(kl_weight=0.5))
    assert (logits.shaping()["method"], logits.shaping()["kl_weight"]) == ("logits", 0.5)


def test_a_card_tells_the_plain_method() -> None:
    assert lessons_of(DistillSpec(), {}) == [
        "LoRA on all linear layers (rank 32, alpha 64), 3 epochs, batches of 16, learning rate "
        "0.0004, seed 0. Loss on the teacher's answer and its stop token only."
    ]
    full = lessons_of(DistillSpec(tuning="full"), {})[0]
    assert full.startswith("Every weight trained, 3 epochs")


@pytest.mark.parametrize(
    ("rounds", "agreement", "kept"),
    [
        ([], "60.0%", ""),
        ([(0.6, 0.7), (0.7, 0.7)], "70.0%", ", 1 of 2 alignment rounds kept"),
        ([(0.6, 0.5)], "60.0%", ", 0 of 1 alignment rounds kept"),
    ],
)
def test_a_card_tells_the_proxy(rounds: Any, agreement: str, kept: str) -> None:
    chain = {"proxy": WARMED, "targets": TARGETS}
    chain |= {f"proxy-round {i}": round_of("proxy-round", *r) for i, r in enumerate(rounds)}
    first, *more = lessons_of(DistillSpec(method="proxy", proxy=PROXY), chain)
    assert "2 times the KL divergence from a proxy's likeliest tokens, weighted" in first
    assert more == [
        "These are known of 98.0% of the answers' tokens, and hold 90.0% of the probability; the "
        "rest is one bucket.",
        "The proxy is org/proxy (licence: MIT). It was taught by LoRA on all linear layers (rank "
        f"32, alpha 64): 2 epochs of the teacher's text{kept}. It gives the teacher's answer to "
        f"{agreement} of the validation prompts (10.0% as it was).",
    ]


def test_a_card_tells_a_proxy_that_was_not_trained() -> None:
    facts = {**WARMED["facts"], "steps": 0, "agreement": 0.9, "agreement_at_start": 0.9}  # type: ignore[dict-item]
    chain = {"proxy": {"stage": "proxy", "facts": facts}}
    told = lessons_of(DistillSpec(method="proxy", proxy=PROXY), chain)[-1]
    assert "It was not trained. It gives the teacher's answer to 90.0%" in told


def test_a_card_tells_further_prompts() -> None:
    facts = {"asked": 9, "kept": 7, "unseen_met": 2}
    chain = {"proxy": WARMED, "proxy-answers": {"stage": "proxy-answers", "facts": facts}}
    told = lessons_of(DistillSpec(method="proxy", proxy=PROXY), chain)[-1]
    assert told.startswith("It answered 9 further prompts")
    assert "7 of these answers are learnt" in told
    assert "2 held-out prompts that are counted as unseen" in told
    assert (unseen_met(chain), unseen_met({"proxy": WARMED})) == (2, 0)


def test_a_card_tells_the_rounds() -> None:
    spec = DistillSpec(method="on-policy", on_policy=OnPolicySpec(feedback="judge"))
    chain = {
        "refine": round_of("refine", 0.5, 0.6, 40),
        "refine 2": round_of("refine", 0.6, 0.6, 30),
    }
    told = lessons_of(spec, chain)[-1]
    assert told.startswith("Then 2 on-policy rounds, 1 kept: 4 answers of the student")
    assert "the teacher judged" in told
    assert told.endswith("70 teacher calls.")
