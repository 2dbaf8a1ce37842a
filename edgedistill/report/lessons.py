"""How a student was taught, in sentences for those who read its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgedistill.methods import DistillSpec, LoraSpec

Json = Mapping[str, Any]
TUNINGS = {
    "lora": "LoRA on all linear layers",
    "dora": "DoRA on all linear layers",
    "rslora": "rank-stabilised LoRA on all linear layers",
    "qlora": "LoRA on all linear layers over 4-bit weights (QLoRA)",
    "full": "Every weight trained",
}
FEEDBACK = {
    "check": "all that the check does not find the same is wrong",
    "judge": "the teacher judged what the check does not find the same, in both orders",
    "preferred": "the teacher said what it prefers where the check does not find the same",
}
LEARNT = {
    "dpo": "DPO of the better answer against the wrong one",
    "rejection": "its right answers as text, the teacher's where none is",
}


def lessons_of(spec: DistillSpec, chain: Mapping[str, Json]) -> list[str]:
    """One sentence or more for each thing that shaped the adapter; `chain`: the manifest of every
    stage by its name."""
    return [
        f"{tuning(spec.tuning, spec.lora)}, {spec.epochs:g} epochs, batches of {spec.batch_size}, "
        f"learning rate {spec.learning_rate:g}, seed {spec.seed}. {_loss(spec)}",
        *_targets(spec, chain),
        *_proxy(spec, chain),
        *_rounds(spec, chain),
    ]


def unseen_met(chain: Mapping[str, Json]) -> int:
    """How many held-out prompts are counted as unseen phrasings although further prompts, which the
    proxy answered, have theirs."""
    return sum(int(each["facts"]["unseen_met"]) for each in _each(chain, "proxy-answers"))


def tuning(name: str, lora: LoraSpec) -> str:
    """What was trained."""
    rank = "" if name == "full" else f" (rank {lora.rank}, alpha {lora.alpha:g})"
    return TUNINGS[name] + rank


def _loss(spec: DistillSpec) -> str:
    text = "Loss on the teacher's answer and its stop token"
    if spec.kl_weight is None:
        return f"{text} only."
    of = "the teacher's" if spec.begins_with == "logits" else "a proxy's"
    weight = f"{spec.kl_weight:g} times the KL divergence from {of} likeliest tokens"
    sure = ", weighted by how likely it finds each answer" if spec.begins_with == "proxy" else ""
    return f"{text}, and {weight}{sure}."


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _each(chain: Mapping[str, Json], stage: str) -> list[Json]:
    return [each for each in chain.values() if each["stage"] == stage]


def _targets(spec: DistillSpec, chain: Mapping[str, Json]) -> Iterator[str]:
    for each in _each(chain, "targets"):
        facts = each["facts"]
        yield (
            f"These are known of {facts['coverage']:.1%} of the answers' tokens, and hold "
            f"{facts['mean_known_mass']:.1%} of the probability; the rest is one bucket."
        )


def _proxy(spec: DistillSpec, chain: Mapping[str, Json]) -> Iterator[str]:
    for each in _each(chain, "proxy"):
        facts, proxy = each["facts"], spec.proxy
        assert proxy is not None, "a stage of the method"
        rounds = [r["facts"] for r in _each(chain, "proxy-round")]
        kept = [r for r in rounds if r["kept"]]
        agreement = kept[-1]["agreement"] if kept else facts["agreement"]
        as_it_is = f"{facts['agreement_at_start']:.1%} as it was"
        lesson = "It was not trained"
        if facts["steps"] or kept:
            warm_up = f"{proxy.warm_up_epochs:g} epochs of the teacher's text" * bool(
                facts["steps"]
            )
            more = f"{len(kept)} of {len(rounds)} alignment rounds kept" * bool(rounds)
            lesson = f"It was taught by {tuning(proxy.tuning, proxy.lora)}: " + ", ".join(
                filter(None, (warm_up, more))
            )
        yield (
            f"The proxy is {facts['name']} (licence: {facts['licence']}). {lesson}. It gives the "
            f"teacher's answer to {agreement:.1%} of the validation prompts ({as_it_is})."
        )
    for each in _each(chain, "proxy-answers"):
        facts = each["facts"]
        yield (
            f"It answered {facts['asked']} further prompts, which the teacher was never asked; "
            f"{facts['kept']} of these answers are learnt as the teacher's are. "
            f"{facts['unseen_met']} held-out prompts that are counted as unseen wordings have one "
            "of these prompts'."
        )


def _rounds(spec: DistillSpec, chain: Mapping[str, Json]) -> Iterator[str]:
    rounds = [each["facts"] for each in _each(chain, "refine")]
    if spec.method != "on-policy":
        return
    ours, kept = spec.on_policy, sum(facts["kept"] for facts in rounds)
    calls = sum(facts["teacher_calls"] for facts in rounds)
    yield (
        f"Then {_counted(len(rounds), 'on-policy round')}, {kept} kept: {ours.samples} answers of "
        f"the student to each training prompt at temperature {ours.temperature:g}; "
        f"{FEEDBACK[ours.feedback]}; {LEARNT[ours.learn]} ({ours.epochs:g} epochs, learning rate "
        f"{ours.learning_rate:g}); {calls} teacher calls."
    )
